"""What the launchers share: names that are checked, words that are quoted, secrets that stay out.

A launcher hands a command to other machines, through shells, job scripts and logs. So a command is
a list of words until the last moment and is quoted by `quoted` alone; a name that becomes part of
another word is held to what its system allows; and what looks like a secret is refused, for all of
it is printed, kept in workdirs and shown to whoever may see the job.
"""

import contextlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
import unicodedata

NAME = re.compile(r'[a-z]([-a-z0-9]*[a-z0-9])?')  # RFC 1035, what clouds and clusters share
SURE = (r'(api|access|private|secret|ssh)[-_.]?keys?|token|secrets?|passw(or)?ds?|passphrase|'
        r'credentials?|connection[-_.]?string|webhook[-_.]?url')
SECRET = re.compile(  # the end of a name: API_KEY, hf.token, hfToken; tokens are counted, not kept
  rf'((^|[-_.])(keys?|{SURE})|[-_.](pass|pat|pwd)|passw(or)?d|passphrase|api[-_]?key|'
  r'(?-i:[a-z](Token|Secret|Key)))([-_]?\d+)?$', re.IGNORECASE)
ODD = ('Cc', 'Cs', 'Zl', 'Zp')  # other alphabets' blanks and joined emoji are none of them
TURNS = '\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069'  # what stands where
LOGIN = re.compile(r'://[^/\s:@]*:[^/\s@]+@|https?://[^/\s:@]+@')  # https://user:password@host
ASSIGNED = re.compile(r'(?P<name>[A-Za-z_][-\w.]*)=(?P<value>.+)', re.DOTALL)
WITHIN = re.compile(  # in a word: of a script, a dict, or --metadata=HF_TOKEN=...; no $(cat FILE)
  rf'(?:^|[^A-Za-z0-9])(?P<name>{SURE})["\']?\s*[=:]\s*["\']?[^\s"\'$,;)}}\]]{{6}}', re.IGNORECASE)
TOKEN = re.compile(  # Hugging Face, GitHub, GitLab, OpenAI and its like, Slack, AWS, Google
  r'(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{16}|gh[pousr]_\w{20}|github_pat_\w{20}|glpat-[-\w]{16}|'
  r'sk-[-\w]{20}|xox[abp]-[-\w]{10}|AKIA[0-9A-Z]{16}|ya29\.[-\w]{20}|AIza[-\w]{30})')
KEPT_AWAY = ('and commands are printed, logged and kept in workdirs: let the command read it, from '
             'a file or the environment of the machines that need it')


class Refused(Exception):
  """A mistake of the user's: what was found, what is allowed, and the remedy."""


def name(text, what, most=63):
  """`text`, where it is a name that clouds and clusters take. Raises Refused."""
  if not NAME.fullmatch(text) or len(text) > most:
    raise Refused(
      f'{what}={text!r}: lower-case letters, digits and hyphens, beginning with a letter, at most '
      f'{most} of them')
  return text


def one_line(text, what):
  """`text`, where no line ends in it and nothing moves a terminal's cursor. Raises Refused."""
  odd = sorted({c for c in text if unicodedata.category(c) in ODD or c in TURNS})
  if odd:
    raise Refused(f'{what}={text!r} holds {", ".join(map(repr, odd))}: write it on one line')
  return text


def quoted(words):
  """A POSIX shell's line of which the words are just these; secrets are refused. Raises Refused."""
  words = [one_line(str(word), 'a word of the command') for word in words]
  refuse_secrets(words)
  return shlex.join(words)


def secret(name, value):
  """Whether a variable of the environment is one."""
  return bool(SECRET.search(name) or LOGIN.search(value) or TOKEN.search(value))


def refuse_secrets(words):
  """Raises Refused for `NAME=VALUE`, a word or within one, or words `--NAME VALUE`, whose name is a
  secret's; for an address that holds a password; and for what has the form of a well-known token.

  What is secret is not told: the message would be the next place that keeps it.
  """
  if any(map(LOGIN.search, words)):
    raise Refused('an address in the command holds a password, and commands are printed, logged '
                  'and kept in workdirs: leave it out, and let the machines log in by themselves')
  if any(map(TOKEN.search, words)):
    raise Refused(f'a word of the command has the form of an access token, {KEPT_AWAY}')
  for word, behind in zip(words, [*words[1:], '']):
    found = ASSIGNED.fullmatch(word.lstrip('-'))
    said = found['name'] if found else word.lstrip('-') if word.startswith('-') else ''
    value = found['value'] if found else behind
    secret = SECRET.search(said) and value and not value.startswith('$' if found else '-')
    within = WITHIN.search(word)
    if secret or within:
      raise Refused(f'{said if secret else within["name"]} looks like a secret, {KEPT_AWAY}')


def told(function, *arguments):
  """What a launcher's `main` returns: `function`'s exit status; 2 and one line for a mistake."""
  try:
    return function(*arguments) or 0
  except Refused as error:
    print(f'error: {error}', file=sys.stderr)
    return 2


@contextlib.contextmanager
def alone(path, said):
  """An open file that is locked within, against other processes of this machine, and those that
  hold it open. Raises Refused, with `said`.
  """
  import fcntl

  with open(path, 'w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise Refused(said) from error
    yield file


def files(root):
  """Paths below `root` that make up the working tree: tracked, or new and not ignored by git.

  Relative, sorted. Raises Refused where `root` is no git checkout, or has folders of another.
  """
  words = ['ls-files', '-z', '--cached', '--others', '--exclude-standard']
  try:
    found = subprocess.run(['git', '-C', str(root), *words], capture_output=True)
  except FileNotFoundError:
    raise Refused('git is not on PATH: it tells which files are the working tree') from None
  if found.returncode:
    said = found.stderr.decode(errors='replace').strip()
    raise Refused(f'{root} is no git checkout ({said}): launch from one')
  names = sorted(set(os.fsdecode(found.stdout).split('\0')) - {''})
  for name in names:
    if (pathlib.Path(root) / name).is_dir():  # which git lists by its name alone
      raise Refused(f'{name} in {root} is a submodule, another checkout or a link to a folder, '
                    'which is not copied: put its files there, or its name into .gitignore')
  return [name for name in names if (pathlib.Path(root) / name).is_file()]
