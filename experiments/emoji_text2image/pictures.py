"""Draws the pictures of this folder, each by the commands it prints, from the three trained runs.

  python experiments/emoji_text2image/pictures.py --pixel runs/emoji_text2image \
      --latent runs/emoji_latent --upscale runs/emoji_upscale [--only guidance ...]

Cells are samples of one command a row, or a few rows with a prompt each, `python -m diffax.main
--workdir RUN --mode sample ...`; rows that are a command each begin with the same noise. The
pictures that edits begin with are real ones of the test split, written to OUT/given. Prompts are
captions that training has not seen: of the test split, or left out by the config.
"""

import argparse
import dataclasses
import pathlib
import shlex
import subprocess
import sys

from matplotlib.figure import Figure
import numpy as np
from PIL import Image

from diffax import images
from diffax.data import sources

HERE = pathlib.Path(__file__).resolve().parent
NAMED = ('flag: Norway', 'red heart', 'woman mage: dark skin tone')
UNSEEN = (*NAMED, 'green heart', 'flag: Colombia', 'doughnut', 'grinning cat with smiling eyes',
          'woman farmer: medium skin tone')
WIDE = 8  # cells of a row


@dataclasses.dataclass
class Row:
  """labels: what stands beside it, more than one for rows whose prompts a command takes in turn.
  run: which of the runs. arguments: of the command. given: pictures in place of a command's.
  """

  labels: tuple
  run: str = ''
  arguments: tuple = ()
  given: np.ndarray | None = None


def asked(*prompts, rows=1, **settings):
  """The arguments that sample prompts in turn."""
  said = [x for prompt in prompts for x in ('--prompt', prompt)]
  said += [f'--config.sample.{k.replace("__", ".")}={v}' for k, v in settings.items()]
  return (*said, f'--config.sample.count={rows * WIDE}')


def figures(out):
  """{name: rows}. out: the folder, where pictures for edits are written."""
  real = emoji()
  given = out / 'given'
  given.mkdir(parents=True, exist_ok=True)
  files = {}
  for caption, pixels in real.items():
    if caption in USED:
      files[caption] = given / f'{caption.replace(": ", "_").replace(" ", "_")}.png'
      images.save(files[caption], pixels)
  mask = np.zeros((64, 64, 1), np.uint8)
  mask[34:] = 255
  images.save(given / 'mask.png', mask)
  small = given / 'small'
  small.mkdir(exist_ok=True)
  for i, caption in enumerate(UPSCALED):
    images.save(small / f'{i}.png', reduced(real[caption]))
  return (
    prompts() | negative() | guidance() | inpaint(files, mask, real) | outpaint(files, real)
    | image_to_image(files, real) | upscale(small, real) | between()
  )


USED = ('woman astronaut', 'flag: Colombia', 'flag: Romania', 'green heart', 'dog face')
UPSCALED = ('woman astronaut', 'flag: Canada', 'green heart', 'dog face', 'pineapple', 'rocket',
            'burrito', 'woman farmer')


def prompts():
  """Held-out prompts by both models, eight draws each."""
  return {
    f'prompts_{run}': [Row(UNSEEN, run, asked(*UNSEEN, rows=len(UNSEEN)))]
    for run in ('pixel', 'latent')
  }


def negative():
  rows = []
  for prompt, without in (
    ('woman farmer', 'woman'), ('red heart', 'red'), ('flag: Norway', 'red')):
    rows.append(Row((prompt,), 'latent', asked(prompt)))
    rows.append(Row((f'{prompt}\nnegative: {without}',), 'latent', (
      '--negative', without, *asked(prompt))))
  return {'negative': rows}


def guidance():
  said = (*NAMED, 'grinning cat with smiling eyes')
  return {'guidance': [
    Row((f'guidance {scale:g}',), 'latent', asked(*said, guidance=scale))
    for scale in (1, 2, 3, 5, 7.5, 10, 15)]}


def inpaint(files, mask, real):
  known = real['woman astronaut']
  shown = np.where(mask > 127, 160, known).astype(np.uint8)
  edit = dict(edit='inpaint', edit__image=files['woman astronaut'],
              edit__mask=files['woman astronaut'].parent / 'mask.png')
  said = ('woman astronaut', 'woman farmer', *NAMED[2:], 'man in lotus position: dark skin tone')
  return {'inpaint': [
    Row(('given, and hidden',), given=np.stack([known, shown])),
    Row(said, 'latent', asked(*said, rows=len(said), **edit))]}


def outpaint(files, real):
  edit = dict(edit='outpaint', edit__image=files['dog face'], edit__left=12, edit__right=12,
              edit__top=0, edit__bottom=24)
  return {'outpaint': [
    Row(('given',), given=real['dog face'][None]),
    Row(('dog',), 'latent', asked('dog', **edit))]}


def image_to_image(files, real):
  rows = []
  for caption, prompt in (('flag: Romania', 'flag: Norway'), ('green heart', 'red heart')):
    rows.append(Row((f'given: {caption}',), given=real[caption][None]))
    for strength in (0.5, 0.7, 0.9):
      edit = dict(edit='image_to_image', edit__image=files[caption], edit__strength=strength)
      rows.append(Row((f'{prompt}\nstrength {strength}',), 'latent', asked(prompt, **edit)))
  return {'image_to_image': rows}


def upscale(small, real):
  known = np.stack([real[caption] for caption in UPSCALED])
  low = np.stack([reduced(x) for x in known])
  edit = dict(edit='upscale', edit__image=small)
  return {'upscale': [
    Row(('16 pixels',), given=low.repeat(4, 1).repeat(4, 2)),
    *(Row((f'64 of them,\nstep {noise}',), 'upscale', asked(*UPSCALED, **edit, edit__noise=noise))
      for noise in (0, 50, 200)),
    Row(('real',), given=known)]}


def between():
  return {'interpolate': [
    Row(('red heart to\nflag: Norway',), 'latent', asked(
      'red heart', 'flag: Norway', edit='interpolate', edit__frames=WIDE)),
    Row(('variations of\nthe first',), 'latent', asked(
      'red heart', edit='variations', edit__seed=0, edit__strength=0.3))]}


def reduced(picture):
  """uint8 [64 64 3] -> [16 16 3]."""
  return np.rint(picture.reshape(16, 4, 16, 4, 3).mean((1, 3))).astype(np.uint8)


def emoji():
  """{caption: uint8 [64 64 3]} of the test split."""
  source = sources.emoji('test')
  return {caption: source[i]['image'] for i, caption in enumerate(source.captions)}


# --- drawing --------------------------------------------------------------------------------------


def drawn(row, runs):
  """uint8 [n h w 3] of a row, by its command."""
  if row.given is not None:
    return row.given
  workdir = runs[row.run]
  command = [sys.executable, '-m', 'diffax.main', '--workdir', str(workdir), '--mode', 'sample',
             *map(str, row.arguments)]
  print(shlex.join(['python', *command[1:]]), flush=True)
  subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
  with np.load(workdir / 'samples.npz') as file:
    return file['arr_0']


def draw(rows, path, runs):
  """A picture of rows with their labels, enlarged twice."""
  strips = []
  for row in rows:
    found = drawn(row, runs)
    strips += [(label, found[i :: len(row.labels)]) for i, label in enumerate(row.labels)]
  width, height, beside = 1.36 * WIDE + 2, 1 / len(strips), 2 / (1.36 * WIDE + 2)
  figure = Figure(figsize=(width, 1.36 * len(strips)), dpi=100)
  for i, (label, found) in enumerate(strips):
    blank = np.full((WIDE - len(found), *found.shape[1:]), 255, np.uint8)
    axes = figure.add_axes([beside, 1 - (i + 1) * height, 1 - beside, height])
    axes.imshow(images.grid(np.concatenate([found, blank]), WIDE, 2, 128), aspect='auto')
    axes.axis('off')
    figure.text(0.005, 1 - (i + 0.5) * height, label.replace(': ', ':\n'), va='center', fontsize=9)
  figure.savefig(path, dpi=100)
  picture = Image.open(path).convert('RGB').quantize(256, dither=Image.Dither.NONE)
  picture.save(path, optimize=True)


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  for name in ('pixel', 'latent', 'upscale'):
    parser.add_argument(f'--{name}', type=pathlib.Path, required=True, help='workdir of that run')
  parser.add_argument('--out', type=pathlib.Path, default=HERE)
  parser.add_argument('--only', nargs='*', default=())
  args = parser.parse_args(argv)
  known = figures(args.out)
  unknown = set(args.only) - set(known)
  if unknown:
    parser.error(f'--only {sorted(unknown)}; there is {", ".join(known)}')
  for name in args.only or known:
    draw(known[name], args.out / f'{name}.png', vars(args))


if __name__ == '__main__':
  main()
