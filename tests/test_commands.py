"""What the launchers share: which words and names pass, and what of the working tree goes along."""

import shlex
import subprocess
import sys

import pytest
import run_diffax

sys.path.insert(0, str(run_diffax.ROOT / 'launch'))

import commands  # noqa: E402


@pytest.mark.parametrize('words', [
  ['python', '-m', 'diffax.main', '--config.data.without=("flag: Norway", "red heart")'],
  ['$(reboot)', '`reboot`', '; reboot', '&& reboot', '> /etc/passwd', "it's", '"', '\\', '*', '~',
   '!!', '#', ''],
])
def test_words_arrive_as_they_are(words):
  line = commands.quoted(words)
  assert shlex.split(line) == words
  shown = subprocess.run(
    ['bash', '-c', f'printf "%s\\0" {line}'], capture_output=True, text=True, check=True)
  assert shown.stdout.split('\0')[:-1] == words


@pytest.mark.parametrize('words', [
  ['API_KEY=abc'], ['--api-key=abc'], ['--config.log.token=abc'], ['HF_TOKEN=abc'],
  ['--password', 'abc'], ['aws_secret_access_key=abc'], ['--config.x.credentials=abc'],
  ['git', 'https://me:abc@host/x'], ['--metadata=HF_TOKEN=abcdef'],
  ['bash', '-c', 'cd x && WANDB_API_KEY=abcdef python -m diffax.main'],
  ['--config.headers={"api_key": "abcdef"}'], ['--login', 'hf_' + 'abc' * 8],
  ['ghp_' + 'abc' * 12], ['http://host/x?token=abcdef'], ['-hf_token', 'abcdef'],
  ['https://abcdef@github.com/x'], ['PGPASSWORD=abc'], ['DB_PASS=abc'], ['hfToken=abc'],
  ['OPENAI_API_KEY_2=abc'], ['MYAPIKEY=abc'], ['AZURE_CONNECTION_STRING=abc'],
])
def test_secrets(words):
  """They are refused, and what is secret is not in the message."""
  with pytest.raises(commands.Refused, match='secret|password|token') as error:
    commands.quoted(words)
  assert 'abc' not in str(error.value)


@pytest.mark.parametrize('words', [
  ['--config.schedule.tokens=4096'], ['--config.model.tokenizer=clip'], ['--key'], ['monkey=1'],
  ['--config.seed=0'], ['gs://bucket/x:y@z'], ['http://host:8080/x'],
  ['bash', '-c', 'WANDB_API_KEY=$(cat key) python -m diffax.main'], ['--prompt', 'a token: ring'],
  ['task-force-of-a-hundred-words'], ['OLDPWD=/x'], ['--config.monkey=1'], ['PATH=/bin'],
  ['--prompt', '赤い　ハート', '👩\u200d🚀\u00a0!'],
])
def test_what_is_no_secret(words):
  assert shlex.split(commands.quoted(words)) == words


@pytest.mark.parametrize('word', ['a\nb', 'a\rb', 'a\0b', 'a\x1b[2Jb', 'a\u2028b', 'a\u202eb'])
def test_lines(word):
  with pytest.raises(commands.Refused, match='one line'):
    commands.quoted([word])


@pytest.mark.parametrize('text', [
  '', 'A', 'a_b', '-a', 'a-', 'a b', 'a;b', '1a', 'a' * 64, 'ä', 'a\n'])
def test_bad_names(text):
  with pytest.raises(commands.Refused, match='--name='):
    commands.name(text, '--name')


def test_names():
  assert [commands.name(x, '--name') for x in ('a', 'a-1', 'a' * 63)] == ['a', 'a-1', 'a' * 63]
  with pytest.raises(commands.Refused, match='at most 5'):
    commands.name('abcdef', '--name', 5)


def test_files(tmp_path):
  """What git tracks or would: new files, too, but for those ignored and those deleted."""
  git = lambda *words: subprocess.run(['git', '-C', str(tmp_path), *words], check=True)
  git('init', '-q')
  for name in ('kept.py', 'gone.py', 'new file.py', 'ignored.log'):
    (tmp_path / name).write_text('')
  (tmp_path / '.gitignore').write_text('*.log\n')
  git('add', 'kept.py', 'gone.py', '.gitignore')
  (tmp_path / 'gone.py').unlink()
  assert commands.files(tmp_path) == ['.gitignore', 'kept.py', 'new file.py']
  (tmp_path / 'none').mkdir()
  with pytest.raises(commands.Refused, match='git checkout'):
    commands.files('/')
  (tmp_path / 'linked').symlink_to(tmp_path / 'none')
  with pytest.raises(commands.Refused, match='linked in .*gitignore'):
    commands.files(tmp_path)


def test_told(capsys):
  def refuse(words):
    raise commands.Refused(f'not {words}')

  assert commands.told(refuse, 'this') == 2
  assert capsys.readouterr().err == 'error: not this\n'
  assert commands.told(lambda: None) == 0 and commands.told(lambda: 3) == 3
