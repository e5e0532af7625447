"""What the launchers share: names that are checked, words that are quoted, secrets that stay out.

A launcher hands a command to other machines, through shells, job scripts and logs. So a command is
a list of words until the last moment and is quoted by `quoted` alone; a name that becomes part of
another word is held to what its system allows; and what looks like a secret is refused, for all of
it is printed, kept in workdirs and shown to whoever may see the job.
"""

import pathlib
import re
import shlex
import subprocess
import sys

NAME = re.compile(r'[a-z]([-a-z0-9]*[a-z0-9])?')  # RFC 1035, what clouds and clusters share
SECRET = re.compile(  # the end of a name: API_KEY, hf.token; tokens are counted, not kept
  r'(^|[-_.])((api_?|access_?|private_?)?keys?|token|secrets?|passwd|passwords?|credentials?)$',
  re.IGNORECASE)
LOGIN = re.compile(r'://[^/\s:@]*:[^/\s@]+@')  # https://user:password@host
ASSIGNED = re.compile(r'(?P<name>[A-Za-z_][-\w.]*)=(?P<value>.+)', re.DOTALL)


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
  odd = sorted({c for c in text if not c.isprintable()})
  if odd:
    raise Refused(f'{what}={text!r} holds {", ".join(map(repr, odd))}: write it on one line')
  return text


def quoted(words):
  """A POSIX shell's line of which the words are just these; secrets are refused. Raises Refused."""
  words = [one_line(str(word), 'a word of the command') for word in words]
  refuse_secrets(words)
  return shlex.join(words)


def refuse_secrets(words):
  """Raises Refused for a word `NAME=VALUE`, or words `--NAME VALUE`, whose name is a secret's, and
  for an address that holds a password.

  What is secret is not told: the message would be the next place that keeps it.
  """
  if any(map(LOGIN.search, words)):
    raise Refused('an address in the command holds a password, and commands are printed, logged '
                  'and kept in workdirs: leave it out, and let the machines log in by themselves')
  for word, behind in zip(words, [*words[1:], '']):
    found = ASSIGNED.fullmatch(word.lstrip('-'))
    said = found['name'] if found else word.lstrip('-') if word.startswith('--') else ''
    if SECRET.search(said) and (found or (behind and not behind.startswith('-'))):
      raise Refused(
        f'{said} looks like a secret, and commands are printed, logged and kept in workdirs: put '
        'it into the environment or a file of the machines that need it')


def told(function, *arguments):
  """What a launcher's `main` returns: `function`'s exit status; 2 and one line for a mistake."""
  try:
    return function(*arguments) or 0
  except Refused as error:
    print(f'error: {error}', file=sys.stderr)
    return 2


def files(root):
  """Paths below `root` that make up the working tree: tracked, or new and not ignored by git.

  Relative, sorted. Raises Refused where `root` is no git checkout.
  """
  found = subprocess.run(
    ['git', '-C', str(root), 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
    capture_output=True)
  if found.returncode:
    raise Refused(f'{root} is no git checkout ({found.stderr.decode().strip()}): launch from one')
  names = sorted(set(found.stdout.decode().split('\0')) - {''})
  return [name for name in names if (pathlib.Path(root) / name).is_file()]
