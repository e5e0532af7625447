"""Sweeps: which runs there are, that all are checked first, that a failure is alone, the table."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import run_diffax

sys.path.insert(0, str(run_diffax.ROOT / 'launch'))

import commands  # noqa: E402, of the folder above
import sweep  # noqa: E402
from commands import Refused  # noqa: E402

# Stands in for training: writes what a run of `run_diffax.get_config` would. The environment says
# what is to happen to a run whose name holds a word: FAIL, STOP or SLOW.
FAKE = '''
import json, os, pathlib, signal, sys, time
words = dict(w.lstrip("-").split("=", 1) for w in sys.argv if "=" in w)
work = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
meant = lambda what: os.environ.get(what, "?") in work.name
steps = int(words.get("config.steps", 20))
with open(work.parent / "starts", "a") as file:
  file.write(work.name + "\\n")
def stop(number, frame):
  print("SIGTERM: stopped at step 7; the same command goes on from it", flush=True)
  sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("began", flush=True)
if meant("SLOW"):
  time.sleep(60)
if meant("FAIL"):
  print("a lot\\nof text", flush=True)
  print("error: out of luck\\n", file=sys.stderr, flush=True)
  sys.exit(3)
if meant("STOP"):
  stop(0, 0)
(work / "checkpoints" / str(steps)).mkdir(parents=True)
config = json.loads(pathlib.Path(__file__).with_suffix(".json").read_text())
config |= dict(steps=steps, seed=int(words.get("config.seed", 0)))
rate = config["learning_rate"]
loss = rate["peak_value"] = float(words.get("config.learning_rate.peak_value", rate["peak_value"]))
(work / "config.json").write_text(json.dumps(config))
row = lambda **values: json.dumps(values) + "\\n"
(work / "metrics.jsonl").write_text(
  row(step=5, loss=9.0) + row(step=steps, loss=loss, steps_per_second=2.0))
(work / "evals.jsonl").write_text(
  row(step=5, eval="samples", frechet=99.0) +
  row(step=steps, eval="samples", frechet=1 / loss, picture="images/x.png"))
'''
GRID = ('--grid=config.learning_rate.peak_value=3e-3,1e-3', '--grid=config.seed=0,1')
EVALS = '--config.evals.samples.every=5'
NAMES = [f'learning_rate.peak_value={r},seed={s}' for r in ('3e-3', '1e-3') for s in (0, 1)]


@pytest.fixture
def fake(tmp_path):
  """The words of a command that stands in for training."""
  path = tmp_path / 'fake.py'
  path.write_text(FAKE)
  config = run_diffax.config(EVALS.removeprefix('--config.'))
  path.with_suffix('.json').write_text(json.dumps(config))
  return ('--', sys.executable, str(path), 'diffax.main', '--config', run_diffax.SMOKE, EVALS)


@pytest.fixture
def root(tmp_path):
  return tmp_path / 'sweep'


def starts(root):
  """The runs that were begun, in order."""
  path = root / 'starts'
  return path.read_text().split() if path.exists() else []


def refused(capsys, *options):
  """The one line with which a command line is refused."""
  assert sweep.main(list(map(str, options))) == 2
  said = capsys.readouterr().err
  assert said.startswith('error: ') and said.count('\n') == 1, said
  return said


# --- which runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize('text, wanted', [
  ('1e-4,3e-4', ['1e-4', '3e-4']),
  ('a', ['a']),
  ("'a','(1, 2)'", ['a', '(1, 2)']),
  ('(1, 2),(3,)', ['(1, 2)', '(3,)']),
  ('[1,(2,3)],{4,5}', ['[1,(2,3)]', '{4,5}']),
  ('"red, round",blue', ['red, round', 'blue']),
  ("('a', 'b'),'c'", ["('a', 'b')", 'c']),
  ("'a','b'", ['a', 'b']),
  ("'a'+'b',c", ["'a'+'b'", 'c']),
  ('")",1', [')', '1']),
  ('"it\'s",x', ["it's", 'x']),
  (' a , b ', ['a', 'b']),
  ("''", ['']),
  ('a=b,c', ['a=b', 'c']),
])
def test_values(text, wanted):
  assert sweep.values(text) == wanted


@pytest.mark.parametrize('text', [
  '', 'a,', ',a', 'a,,b', '(1,2', '1)', '(1]', "'a", 'it"s', '{[}]'])
def test_values_that_are_none(text):
  with pytest.raises(Refused):
    sweep.values(text)


def test_grid(root):
  args = sweep.arguments(['--workdir', str(root), *GRID])
  found = sweep.runs(args)
  assert [run.name for run in found] == NAMES
  assert found[1].words() == ['--workdir', str(root / NAMES[1]),
                              '--config.learning_rate.peak_value=3e-3', '--config.seed=1']


def test_list(root, tmp_path):
  file = tmp_path / 'list'
  file.write_text('# a comment\n\nconfig.seed=1 --config.steps=5  # and another\n'
                  '''config.sample.negative="two words, 'quoted'"\n''')
  args = sweep.arguments(['--workdir', str(root), '--list', str(file)])
  found = sweep.runs(args)
  assert [run.overrides for run in found] == [
    {'config.seed': '1', 'config.steps': '5'},
    {'config.sample.negative': "two words, 'quoted'"}]


def test_names():
  """Readable where they can be, safe and bounded always, and of the overrides alone."""
  name = lambda **overrides: sweep.named({f'config.{k}': v for k, v in overrides.items()})
  assert name(seed='0', rate='1e-4') == 'seed=0,rate=1e-4'
  hard = ['a/b', '../..', 'a b', 'a-b', 'a\tb', '(1, 2)', 'ä', '$(id)', '`', '', 'x' * 300,
          'x' * 299 + 'y', 'b,seed=0', '|', '*']
  found = [name(value=value) for value in hard]
  assert len(set(found)) == len(hard)
  for each in found:
    assert len(each) <= 100 and '/' not in each
    assert all(c.isascii() and (c.isalnum() or c in '._=,+-') for c in each), each
  assert found == [name(value=value) for value in hard]
  assert name(a='1', b='2') != name(a='1,b=2')


def test_order_of_keys_is_no_matter(root):
  names = lambda *grid: {r.name for r in sweep.runs(sweep.arguments(['--workdir=w', *grid]))}
  assert names(*GRID) == names(*reversed(GRID))


@pytest.mark.parametrize('options, words', [
  ([], ['--grid', '--list']),
  (['--grid=config.seed=0', '--list=x'], ['one of them']),
  (['--grid=seed=0'], ["'seed=0'", 'config.KEY']),
  (['--grid=config.seed'], ['config.KEY']),
  (['--grid=config.a;b=1'], ['config.KEY']),
  (['--grid=config.seed=0,0'], ['seed=0', 'same']),
  (['--grid=config.seed=0', '--grid=config.seed=1'], ['config.seed', 'twice']),
  (['--grid=config.seed='], ['empty']),
  (['--list=nosuch'], ['nosuch']),
  (['--grid=config.seed=0', '--jobs=0'], ['--jobs=0']),
  (['--grid=config.seed=0,1', '--via=tpu_vm'], ['which TPU']),
  (['--grid=config.seed=0,1', '--via', 'slurm', '--name=x'], ['--name']),
  (['--grid=config.seed=0,1', '--via', 'tpu_vm', 'tune', '--run', 'x'], ['--run']),
])
def test_what_is_refused(options, words, root, fake, capsys):
  said = refused(capsys, '--workdir', root, *options, *fake)
  assert all(word in said for word in words), said
  assert not root.exists()


@pytest.mark.parametrize('text, words', [
  ('config.seed=0\nconfig.seed=0\n', ['same']),
  ('config.seed=0\nconfig.seed="1\n', ['line 2', 'quotation']),
  ('config.seed=0 config.seed=1', ['line 1', 'twice']),
  ('\n\nseed=0', ['line 3', 'config.KEY']),
  ('# nothing\n', ['no run']),
])
def test_lists_that_are_refused(text, words, root, tmp_path, fake, capsys):
  file = tmp_path / 'list'
  file.write_text(text)
  said = refused(capsys, '--workdir', root, '--list', file, *fake)
  assert all(word in said for word in words), said
  assert not root.exists()


@pytest.mark.parametrize('grid, command, words', [
  ('config.seed=0,1,x', [], ['seed=x']),
  ('config.stepz=1', [], ['stepz', 'did you mean steps']),
  ('config.optimizer=adamw,adamm', [], ['optimizer=adamm', 'did you mean']),
  ('config.seed=0', ['--nosuch=1'], ['nosuch']),
  ('config.seed=0', ['--workdir=x'], ["command's --workdir"]),
  ('config.seed=0', ['--mode=evaluate'], ['--mode']),
  ('config.seed=0', ['--config.api_key=hunter2'], ['secret']),
  ('config.text.token=hunter2', [], ['secret']),
  ('config.sample.negative="a\nb"', [], ['one line']),
])
def test_all_is_checked_before_any_begins(grid, command, words, root, fake, capsys):
  said = refused(capsys, '--workdir', root, '--grid', grid, *fake, *command)
  assert all(word in said for word in words), said
  assert 'hunter2' not in said
  assert not root.exists()


def test_a_command_that_is_another(root, capsys):
  options = ('--workdir', root, '--grid=config.seed=0', '--')
  assert 'diffax.main' in refused(capsys, *options, sys.executable, '-c', 'pass')
  assert 'nosuch' in refused(capsys, *options, 'nosuch', 'diffax.main')
  assert 'diffax.main' in refused(capsys, *options[:-1])


def test_a_workdir_of_another_run(root, fake, capsys):
  """The config of a run that is there decides, as for the run itself."""
  folder = root / 'seed=1'
  folder.mkdir(parents=True)
  config = run_diffax.config('seed=2')
  (folder / 'config.json').write_text(json.dumps(config))
  said = refused(capsys, '--workdir', root, '--grid=config.seed=0,1', *fake)
  assert 'seed=1' in said and 'seed: 2 -> 1' in said
  assert not starts(root)


# --- here -----------------------------------------------------------------------------------------


def cells(line):
  return [cell.strip() for cell in re.split(r'(?<!\\)\|', line)[1:-1]]


def test_sweep(root, fake, capsys, monkeypatch):
  """A run that fails is told with its last line, the others end; only it is begun again."""
  options = ['--workdir', str(root), *GRID, '--jobs=2', '--metric', 'samples.frechet', 'loss']
  monkeypatch.setenv('FAIL', NAMES[2])
  assert sweep.main([*options, *fake]) == 1
  said = capsys.readouterr().out
  assert sorted(starts(root)) == sorted(NAMES)
  assert f'FAILED   {NAMES[2]}: status 3: error: out of luck ({root / NAMES[2]}.log)' in said
  assert said.count('FAILED') == 1 and said.count('finished learning') == 3
  assert (root / f'{NAMES[2]}.log').read_text().startswith('began\na lot')
  table = (root / 'table.md').read_text().splitlines()
  assert said.endswith('\n'.join(table) + '\n')
  assert cells(table[0]) == ['learning_rate.peak_value', 'seed', 'state', 'samples.frechet', 'loss']
  assert [cells(line) for line in table[2:]] == [  # the last rows, of the least distance first
    ['3e-3', '0', 'finished', '333.333', '0.003'], ['3e-3', '1', 'finished', '333.333', '0.003'],
    ['1e-3', '1', 'finished', '1000', '0.001'], ['1e-3', '0', 'not begun', '', '']]

  monkeypatch.delenv('FAIL')
  assert sweep.main([*options, *fake]) == 0
  assert '4 runs in' in capsys.readouterr().out
  assert starts(root)[4:] == [NAMES[2]]
  assert (root / f'{NAMES[2]}.log').read_text().count('began') == 2  # nothing written is lost


def test_a_run_that_stopped_is_not_finished(root, fake, capsys, monkeypatch):
  monkeypatch.setenv('STOP', 'seed=0')
  assert sweep.main(['--workdir', str(root), '--grid=config.seed=0,1', *fake]) == 1
  said = capsys.readouterr().out
  assert 'stopped  seed=0: SIGTERM: stopped at step 7' in said and 'finished seed=1' in said
  assert starts(root) == ['seed=0', 'seed=1']


def test_what_counts_as_finished(root, fake, capsys):
  """The checkpoint of the last step and all evaluations due there, of the steps now asked for."""
  options = ('--workdir', str(root), '--grid=config.seed=0', *fake)
  assert sweep.main(list(options)) == 0
  work = root / 'seed=0'
  assert sweep.state(work) == (20, 20, True)
  evals = (work / 'evals.jsonl').read_text()
  (work / 'evals.jsonl').write_text(evals.splitlines()[0] + '\n')
  assert sweep.state(work) == (20, 20, False)
  (work / 'evals.jsonl').write_text(evals)
  (work / 'checkpoints' / '20').rename(work / 'checkpoints' / '20.orbax-checkpoint-tmp')
  assert sweep.state(work) == (20, 20, False)
  (work / 'checkpoints' / '10').mkdir()
  (work / 'metrics.jsonl').unlink()
  assert sweep.state(work) == (10, 20, False)
  assert not sweep.state(work, json.loads((work / 'config.json').read_text()) | {'steps': 40})[2]
  assert sweep.state(root / 'nosuch') == (0, 0, False)


def wait_for(condition, process):
  end = time.monotonic() + 120
  while not condition():
    assert process.poll() is None and time.monotonic() < end
    time.sleep(0.05)


def test_signals(root, fake):
  """SIGTERM reaches the runs, which save; no other is begun, and no sweep beside it either."""
  command = [sys.executable, str(run_diffax.ROOT / 'launch' / 'sweep.py'), '--workdir', str(root),
             '--grid=config.seed=0,1,2', '--jobs=2', *fake]
  env = run_diffax.environment() | {'SLOW': 'seed='}
  process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
  try:
    begun = lambda i: (root / f'seed={i}.log').exists() and (
      (root / f'seed={i}.log').read_text() == 'began\n')
    wait_for(lambda: begun(0) and begun(1), process)
    with pytest.raises(Refused, match='busy'), commands.alone(root / 'sweep.lock', 'busy'):
      pass
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
  finally:
    process.kill()
  assert process.returncode == 128 + signal.SIGTERM
  assert said.count('stopped  seed=') == 2 and '1 runs were not begun' in said
  assert sorted(starts(root)) == ['seed=0', 'seed=1']
  with commands.alone(root / 'sweep.lock', 'busy'):  # the lock is free again
    pass


def test_the_real_thing(root, capsys, monkeypatch):
  """A training run, whose numbers the table has, and which is not begun again."""
  for name, value in run_diffax.environment().items():
    monkeypatch.setenv(name, value)
  command = ['--workdir', str(root), '--grid=config.seed=4', '--metric=loss', '--',
             sys.executable, '-m', 'diffax.main', f'--config={run_diffax.SMOKE}',
             '--config.steps=2', '--config.log_every=1']
  assert sweep.main(command) == 0, capsys.readouterr().out
  found = cells(capsys.readouterr().out.splitlines()[-1])
  assert found[:2] == ['4', 'finished']
  assert float(found[2]) == pytest.approx(run_diffax.numbers(root / 'seed=4')[-1]['loss'], 1e-5)
  log = (root / 'seed=4.log').read_text()
  assert 'step 2/2' in log
  assert sweep.main(command) == 0
  assert '1 finished before' in capsys.readouterr().out
  assert (root / 'seed=4.log').read_text() == log


# --- the table ------------------------------------------------------------------------------------


def folder(root, name, loss, **evals):
  work = root / name
  work.mkdir(parents=True)
  (work / 'config.json').write_text(json.dumps(dict(steps=10, evals={})))
  (work / 'metrics.jsonl').write_text(json.dumps(dict(step=10, loss=loss, mfu=0.5)) + '\n')
  rows = [dict(step=10, eval=name, **values) for name, values in evals.items()]
  (work / 'evals.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


def test_table(root, capsys):
  for i, loss in enumerate([0.5, 0.25, float('nan'), 1.5]):
    folder(root, f'seed={i}', loss, quality=dict(recall=i / 4, grid='images/a.png'))
  overrides = [{'config.seed': str(i)} for i in range(4)] + [{'config.note': 'a|b\\'}]
  found = [sweep.Run(sweep.named(o), o, root / sweep.named(o)) for o in overrides]
  sweep.record(root, found)
  order = lambda *options: [cells(line)[1] for line in said(*options)[2:]]

  def said(*options):
    assert sweep.main(['--workdir', str(root), '--table', *options]) == 0
    return capsys.readouterr().out.splitlines()

  lines = said()
  assert cells(lines[0]) == ['note', 'seed', 'state', 'loss', 'quality.recall']
  assert cells(lines[2]) == ['', '0', 'step 10 of 10', '0.5', '0']
  assert lines[6].startswith('| a\\|b\\\\ |') and 'not begun' in lines[6]
  assert len(set(map(len, lines))) == 1
  assert order('--metric', 'loss') == ['1', '0', '3', '2', '']
  assert order('--metric', 'loss', '--highest') == ['3', '0', '1', '2', '']
  assert order('--metric', 'quality.recall', '--highest') == ['3', '2', '1', '0', '']
  assert [cells(line)[0] for line in said('--grid=config.seed=3,1')[2:]] == ['3', '1']
  assert 'no run has it; there are loss, quality.recall' in refused(
    capsys, '--workdir', root, '--table', '--metric', 'los')


def test_no_sweep(root, capsys):
  assert 'no sweep' in refused(capsys, '--workdir', root, '--table')
  assert not root.exists()


def test_sweeps_add_up(root, fake, capsys):
  """A sweep that grew keeps its runs, and --table shows them all."""
  for grid in ('config.seed=0', 'config.seed=0,1', 'config.seed=2'):
    assert sweep.main(['--workdir', str(root), '--grid', grid, *fake]) == 0
  assert starts(root) == ['seed=0', 'seed=1', 'seed=2']
  capsys.readouterr()
  assert sweep.main(['--workdir', str(root), '--table']) == 0
  assert [cells(line)[0] for line in capsys.readouterr().out.splitlines()[2:]] == ['0', '1', '2']


# --- through other launchers ----------------------------------------------------------------------


@pytest.fixture
def launcher(tmp_path, monkeypatch):
  """The words that launchers were given: those of a copy of the folder, which only note them."""
  there = tmp_path / 'launch'
  there.mkdir()
  for name in ('slurm', 'k8s', 'tpu_vm'):
    (there / f'{name}.py').write_text(
      'import json, os, sys\nwith open(os.environ["TOLD"], "a") as file:\n'
      '  file.write(json.dumps(sys.argv) + "\\n")\n'
      'sys.exit(os.environ.get("FAIL", "?") in " ".join(sys.argv))\n')
  monkeypatch.setattr(sweep, '__file__', str(there / 'sweep.py'))
  told = tmp_path / 'told'
  monkeypatch.setenv('TOLD', str(told))
  return lambda: [json.loads(line) for line in told.read_text().splitlines()]


@pytest.mark.parametrize('via, verb', [('slurm', 'submit'), ('k8s', 'submit'), ('tpu_vm', 'run')])
def test_through(via, verb, root, fake, launcher, capsys, monkeypatch):
  """A launcher is given its options, a name, and the very words; what it took is left to it."""
  own = (['tpu-1'] if via == 'tpu_vm' else []) + ['--nodes', '2', '--label=a=b c']
  grid = "--grid=config.sample.negative=$(id) ; 'x','a, b'"
  command = ['--workdir', str(root), grid, '--via', via, *own, *fake]
  monkeypatch.setenv('FAIL', 'a, b')
  assert sweep.main(command) == 1
  assert 'FAILED' in capsys.readouterr().out
  first, second = launcher()
  found, names = sweep.runs(sweep.arguments(command)), []
  for words, run in zip((first, second), found, strict=True):
    assert pathlib.Path(words[0]).name == f'{via}.py' and words[1] == verb
    at = words.index('--')
    assert words[at + 1 :] == [*fake[1:], *run.words()]
    name = words[words.index('--run' if via == 'tpu_vm' else '--name') + 1]
    names.append(sweep.commands.name(name, '', 40))
    assert words[2:at] == (
      [*own, '--run', name, '--watch'] if via == 'tpu_vm' else ['--name', name, *own])
  assert len(set(names)) == 2

  monkeypatch.delenv('FAIL')
  assert sweep.main(command) == 0
  capsys.readouterr()
  assert len(launcher()) == (4 if via == 'tpu_vm' else 3)  # those that it did not take
  assert sweep.main([*command[:3], '--again', *command[3:]]) == 0
  assert len(launcher()) == (6 if via == 'tpu_vm' else 5)


def test_through_leaves_out_what_is_finished(root, fake, launcher, capsys):
  assert sweep.main(['--workdir', str(root), '--grid=config.seed=0', *fake]) == 0
  assert sweep.main(['--workdir', str(root), '--grid=config.seed=0,1', '--via=slurm', *fake]) == 0
  assert [words[-1] for words in launcher()] == ['--config.seed=1']
  assert not os.path.exists(root / 'seed=0.submitted')


def test_names_of_jobs(tmp_path):
  """Two sweeps of the same grid do not meet in one cluster."""
  name = lambda folder: sweep.job(
    args := sweep.arguments(['--workdir', folder, '--grid=config.seed=0', '--via', 'k8s']),
    sweep.runs(args)[0])[4]
  assert name('gs://b/one/sweep') != name('gs://b/two/sweep')
  assert name('runs/My_Sweep.2').startswith('my-sweep-2-')
  assert name('runs/2nd').startswith('sweep-')
