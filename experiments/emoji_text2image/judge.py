"""The judge of text-to-image on the emoji: how often a picture finds its own caption among fifty.

  python experiments/emoji_text2image/judge.py train --out DIR
  python experiments/emoji_text2image/judge.py captions --out FILE.txt     # to be drawn
  python experiments/emoji_text2image/judge.py score --judge DIR --samples FILE.npz --captions FILE

The data is `$DIFFAX_DATA/emoji` (default ../shared/data/emoji). FILE.npz holds `arr_0`, uint8
[n 64 64 3]; the captions, a line of a .txt file or a `caption` of a .jsonl file each, are of the
test split, in any order and as often as one likes. The judge saw the real train pictures alone.

Two encoders bring pictures and captions to unit vectors u and v, learned by the symmetric
contrastive loss of CLIP (Radford et al. 2021, section 2.3) over a batch:

  loss = (CE(scale u v^T, i) + CE(scale v u^T, i)) / 2

plus what a picture is to tell of its caption's words and of its `subgroup`, and a caption of its
subgroup: with a few thousand pictures these say sooner what counts. The picture's encoder keeps
places apart to the end, for 'facing right' is one. A caption is the bag of its words, of their
letters in threes to fives, of words in twos and threes, and of its parts by their place ('kiss:
man, man, dark skin tone' has four): a word never seen still has letters that were.

Of a picture with k other captions nearer than its own among m others, the share of draws of 49 of
them in which its own comes first is C(m - k, 49) / C(m, 49): no draw is made, the mean over all
of them is exact. Standard errors are of the choice of `base` values (emoji without skin tones),
whose six tones do not count as six. Rows:

  samples   the pictures on trial
  real      the real test pictures of the same captions: what a perfect generator would have
  behind    real less samples, a caption at a time: its error is that of the comparison
  shuffled  the pictures on trial, each with a caption of the test split drawn at random: chance
  train     real train pictures, as many as test, of whole `base` values, among their own captions
"""

import argparse
from collections.abc import Sequence
import itertools
import json
import math
import os
import pathlib
import re
import sys
import time
from typing import Any, NamedTuple

import einops
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

SIDE = 64  # pixels a side of what is judged
AMONG = 50  # captions that a picture chooses among
SHUFFLES = 20
STEPS = 800
CHUNK = 128  # pictures or captions encoded at a time
TELLING = 6  # a picture is to tell the words and parts that so many `base` values have


class Set(NamedTuple):
  """Pictures, uint8 [n 64 64 3], and n strings of each other kind; see the data's README."""

  images: np.ndarray
  captions: Sequence[str]
  bases: Sequence[str]
  subgroups: Sequence[str]


class Judge(NamedTuple):
  """A trained judge: its network's parameters, and the terms of captions with their weights [v]."""

  params: Any
  design: dict
  terms: Sequence[str]
  weights: np.ndarray


# --- data -----------------------------------------------------------------------------------------


def emoji(split):
  """The `Set` of the emoji of a split, 'train' or 'test'. Raises ValueError where there is none."""
  root = pathlib.Path(os.environ.get('DIFFAX_DATA') or '../shared/data', 'emoji')
  if not (root / 'emoji64.npz').is_file():
    raise ValueError(f'there is no {root}/emoji64.npz: set DIFFAX_DATA to the folder of emoji/')
  lines = (root / 'captions.jsonl').read_text(encoding='utf-8').splitlines()
  records = [r for r in map(json.loads, lines) if r['split'] == split]
  with np.load(root / 'emoji64.npz') as file:
    images = file['image'][[r['index'] for r in records]]
  return Set(images, *([r[name] for r in records] for name in ('caption', 'base', 'subgroup')))


def part(data, bases):
  """What of a `Set` has one of `bases`."""
  rows = [i for i, base in enumerate(data.bases) if base in bases]
  return Set(data.images[rows], *([column[i] for i in rows] for column in data[1:]))


def draw(data, count, seed):
  """About `count` pictures of a `Set` and the rest, of whole `base` values drawn with `seed`."""
  bases, counts = np.unique(data.bases, return_counts=True)
  order = np.random.default_rng(seed).permutation(len(bases))
  chosen = set(bases[order][: np.searchsorted(np.cumsum(counts[order]), count) + 1])
  return part(data, chosen), part(data, set(data.bases) - chosen)


def terms(caption):
  """The set of a caption's terms: '<word>', letters, 'two words', 'last$', '@place part'."""
  words = re.findall(r'[^\W_]+(?:-[^\W_]+)*|[^\w\s:,]', caption.lower())
  parts = [p.strip() for p in re.split('[:,]', caption.lower())]
  found = {f'@{i} {p}' for i, p in enumerate(parts[1:], 1)}
  if words:
    found |= {f'{words[0]}^', f'{words[-1]}$', f'@last {parts[-1]}', f'{len(words)} words'}
  for word in words:
    word = f'<{word}>'
    found |= {word, *(word[i : i + n] for n in (3, 4, 5) for i in range(len(word) - n + 1))}
  for n in (2, 3):
    found |= {' '.join(words[i : i + n]) for i in range(len(words) - n + 1)}
  return found


def vocabulary(data, least):
  """The sorted terms that the captions of `least` or more `base` values of a `Set` have."""
  pairs = {(t, b) for caption, b in zip(data.captions, data.bases) for t in terms(caption)}
  counts = {}
  for term, _ in pairs:
    counts[term] = counts.get(term, 0) + 1
  return sorted(t for t, count in counts.items() if count >= least)


def present(captions, names):
  """Which terms of `names` [v] captions have, float32 0 or 1 [n v]."""
  place = {name: i for i, name in enumerate(names)}
  rows = np.zeros((len(captions), len(names)), np.float32)
  for row, caption in zip(rows, captions):
    row[[place[t] for t in terms(caption) if t in place]] = 1
  return rows


def bags(captions, names, weights):
  """What the caption's encoder is given, float32 [n v]: weighted terms, of one length."""
  rows = present(captions, names) * weights
  return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-3) * np.sqrt(20)


# --- networks -------------------------------------------------------------------------------------


class Picture(nn.Module):
  """Pictures [b 64 64 3], 0 for white, 1 for black, to features [b d]; places are kept apart.

  The white around a picture is what norms measure its colours by: were it 0 within, they would
  bring grey and black to the same.
  """

  widths: Sequence[int]
  dropout: float

  @nn.compact
  def __call__(self, x, train):
    unit = lambda x, width: nn.relu(
      nn.GroupNorm(None, group_size=16)(nn.Conv(width, (3, 3), use_bias=False)(x))
    )
    finest, fine, middle, coarse = self.widths
    x = einops.rearrange(1 - 2 * x, 'b (h p) (w q) c -> b h w (p q c)', p=2, q=2)
    x = _pool(unit(x, finest))  # [b 16 16 c]
    x = _pool(unit(x, fine))  # [b 8 8 c]
    x = unit(x, middle)
    x = _pool(x + unit(x, middle))  # [b 4 4 c]
    x = unit(x, coarse)
    places = einops.rearrange(nn.relu(nn.Dense(32)(x)), 'b h w c -> b (h w c)')
    x = jnp.concatenate([x.mean((1, 2)), places], axis=-1)
    return nn.Dropout(self.dropout, deterministic=not train)(x)


def _pool(x):
  """The largest of two by two; written out, for XLA's gradient of a max pool is slow on a CPU."""
  corners = [x[:, i::2, j::2] for i in range(2) for j in range(2)]
  return jnp.maximum(jnp.maximum(*corners[:2]), jnp.maximum(*corners[2:]))


class Caption(nn.Module):
  """Bags of terms [b v] to features [b d]; terms are dropped in training."""

  width: int
  dropout: float
  forget: float

  @nn.compact
  def __call__(self, bag, train):
    bag = nn.Dropout(self.forget, deterministic=not train)(bag)
    x = nn.LayerNorm()(nn.Dense(self.width, use_bias=False)(bag))
    y = nn.Dense(self.width)(nn.relu(nn.Dense(2 * self.width)(x)))
    return x + nn.Dropout(self.dropout, deterministic=not train)(y)


class Network(nn.Module):
  """Both encoders; `__call__` returns (u, v, scale, and logits of what else is told)."""

  widths: Sequence[int]
  width: int
  dropout: float
  forget: float
  subgroups: int
  words: int

  def setup(self):
    self.picture = Picture(self.widths, self.dropout)
    self.caption = Caption(self.width, self.dropout, self.forget)
    self.from_picture, self.from_caption = nn.Dense(self.width), nn.Dense(self.width)
    self.log_scale = self.param('log_scale', nn.initializers.constant(math.log(20)), ())
    self.told = {
      'picture': nn.Dense(self.subgroups), 'caption': nn.Dense(self.subgroups),
      'words': nn.Dense(self.words),
    }

  def images(self, x):
    return unit_length(self.from_picture(self.picture(x, False)))  # [b d]

  def captions(self, bag):
    return unit_length(self.from_caption(self.caption(bag, False)))  # [b d]

  def __call__(self, x, bag, train=False):
    x, y = self.picture(x, train), self.caption(bag, train)
    told = [self.told[name](z) for name, z in (('picture', x), ('caption', y), ('words', x))]
    scale = jnp.minimum(jnp.exp(self.log_scale), 100)  # as in CLIP
    return unit_length(self.from_picture(x)), unit_length(self.from_caption(y)), scale, told


def unit_length(x):
  return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def prepare(images):
  """uint8 -> float32, 0 for white, which is what lies beyond the edge."""
  return 1 - images.astype(jnp.float32) / 255


def augment(key, x, shift=4, stretch=0.12):
  """Moves each picture [b h w c] by up to `shift` pixels and scales it by up to e^`stretch`.

  Never mirrored: left and right are said in captions.
  """
  moves, sizes, sides = jax.random.split(key, 3)
  n, side = len(x), x.shape[1]
  scale = jax.random.uniform(sizes, (n, 1), minval=-stretch, maxval=stretch)
  scale = jnp.exp(scale + jax.random.uniform(sides, (n, 2), minval=-0.04, maxval=0.04))
  move = jax.random.uniform(moves, (n, 2), minval=-shift, maxval=shift)
  move += side / 2 * (1 - scale)
  place = lambda x, scale, move: jax.image.scale_and_translate(
    x, x.shape, (0, 1), scale, move, 'linear'
  )
  return jax.vmap(place)(x, scale, move)


# --- training -------------------------------------------------------------------------------------

DESIGN = dict(widths=(32, 64, 128, 256), width=128, dropout=0.2, forget=0.3)


def train(data, steps=STEPS, batch=128, seed=0, design=None):
  """Trains a `Judge` on a `Set`; the same seed gives the same one."""
  design = design or DESIGN
  least = min(3, len(set(data.bases)))
  names = vocabulary(data, least)
  counts = present(data.captions, names).sum(0)
  weights = np.sqrt(np.log(1 + len(data.captions) / (1 + counts))).astype(np.float32)
  bag = bags(data.captions, names, weights)
  words = [t for t in vocabulary(data, TELLING) if t[0] in '<@' and (t[0] == '@' or t[-1] == '>')]
  told = present(data.captions, words)
  subgroups, subgroup = np.unique(data.subgroups, return_inverse=True)
  network = Network(**design, subgroups=len(subgroups), words=len(words))

  key, init = jax.random.split(jax.random.key(seed))
  params = jax.jit(network.init)(init, prepare(data.images[:2]), bag[:2])['params']
  rate = optax.warmup_cosine_decay_schedule(0, 1e-3, steps // 10, steps)
  kernels = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.1, mask=kernels)
  )

  def step(params, state, key, images, bag, subgroup, told):
    (_, contrast), grads = jax.value_and_grad(loss, has_aux=True)(
      params, network, key, images, bag, subgroup, told
    )
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, contrast

  step = jax.jit(step, donate_argnums=(0, 1))
  columns, state, start = (data.images, bag, subgroup, told), optimizer.init(params), time.time()
  for i, rows in enumerate(itertools.islice(_batches(len(bag), batch, seed), steps)):
    params, state, contrast = step(
      params, state, jax.random.fold_in(key, i), *(column[rows] for column in columns)
    )
    if (i + 1) % 100 == 0:
      taken = f'{time.time() - start:.0f} s'
      print(f'step {i + 1} of {steps}: loss {contrast:.3f}, {taken}', flush=True)
  return Judge(jax.device_get(params), design, names, weights)


def loss(params, network, key, images, bag, subgroup, told):
  """(All that is learned by, the contrastive loss alone); see above."""
  move, drop = jax.random.split(key)
  u, v, scale, (of_picture, of_caption, words) = network.apply(
    {'params': params}, augment(move, prepare(images)), bag, True, rngs={'dropout': drop}
  )
  entropy = lambda z, y: optax.softmax_cross_entropy_with_integer_labels(z, y).mean()
  logits, own = scale * u @ v.T, jnp.arange(len(u))
  contrast = (entropy(logits, own) + entropy(logits.T, own)) / 2
  group = (entropy(of_picture, subgroup) + entropy(of_caption, subgroup)) / 2
  word = optax.sigmoid_binary_cross_entropy(words, told).sum(-1).mean()
  return contrast + 0.3 * group + 0.06 * word, contrast


def _batches(count, batch, seed):
  """Rows of batches without end, each row once before any comes again."""
  rng, left = np.random.default_rng(seed), np.zeros(0, int)
  while True:
    while len(left) < batch:
      left = np.concatenate([left, rng.permutation(count)])
    yield left[:batch]
    left = left[batch:]


def save(judge, folder):
  """Writes judge.safetensors, in float16, and judge.json into `folder`."""
  from safetensors.numpy import save_file

  kept = {k: v for k, v in judge.params.items() if not k.startswith('told')}
  tensors = flax.traverse_util.flatten_dict(kept, sep='.') | {'weights': judge.weights}
  folder.mkdir(parents=True, exist_ok=True)
  tensors = {k: np.asarray(v, np.float16) for k, v in tensors.items()}
  save_file(tensors, folder / 'judge.safetensors')
  text = json.dumps({'design': judge.design, 'terms': list(judge.terms)}, ensure_ascii=False)
  (folder / 'judge.json').write_text(text + '\n', encoding='utf-8')


def load(folder):
  """The `Judge` that `save` wrote. Raises ValueError where `folder` has none."""
  from safetensors.numpy import load_file

  if not (folder / 'judge.safetensors').is_file():
    raise ValueError(f'there is no {folder}/judge.safetensors: give `train --out {folder}` first')
  told = json.loads((folder / 'judge.json').read_text(encoding='utf-8'))
  tensors = load_file(folder / 'judge.safetensors')
  tensors = {k: v.astype(np.float32) for k, v in tensors.items()}
  weights = tensors.pop('weights')
  params = flax.traverse_util.unflatten_dict(tensors, sep='.')
  return Judge(params, told['design'], told['terms'], weights)


# --- judging --------------------------------------------------------------------------------------


def encode_images(judge, images):
  """Unit vectors [n d] of pictures, uint8 [n 64 64 3]."""
  return _encode(judge, lambda network, x: network.images(prepare(x)), images)


def encode_captions(judge, captions):
  """Unit vectors [n d] of n captions."""
  return _encode(judge, Network.captions, bags(captions, judge.terms, judge.weights))


def _encode(judge, method, x):
  network = Network(**judge.design, subgroups=1, words=1)
  apply = jax.jit(lambda x: network.apply({'params': judge.params}, x, method=method))
  full = np.concatenate([x, np.zeros((-len(x) % CHUNK, *x.shape[1:]), x.dtype)])
  chunks = [apply(full[i : i + CHUNK]) for i in range(0, len(x), CHUNK)]
  return np.concatenate(chunks)[: len(x)]


def retrieval(scores, own, first=1, among=AMONG):
  """Share of draws in which the own caption is of the `first`, for each picture: float64 [n].

  scores: of pictures for captions, [n m]. own: which caption is each picture's, [n]. A caption as
  near as the own counts as nearer. A draw is of among - 1 other captions; with k of m nearer, the
  nearer ones among them are hypergeometric.
  """
  own_scores = np.take_along_axis(scores, own[:, None], axis=1)
  nearer, others = (scores >= own_scores).sum(1) - 1, scores.shape[1] - 1
  chance = lambda k: sum(
    math.comb(k, j) * math.comb(others - k, among - 1 - j) for j in range(first)
  ) / math.comb(others, among - 1)
  table = np.array([chance(k) for k in range(others + 1)])
  return table[nearer]


def mean_and_error(hits, clusters):
  """(mean, its standard error) of hits [n], of which those of one cluster are not independent."""
  _, cluster = np.unique(clusters, return_inverse=True)
  sums = np.bincount(cluster, hits - hits.mean())
  count = len(sums)
  error = np.sqrt(np.sum(sums**2) * count / max(count - 1, 1)) / len(hits)
  return float(hits.mean()), float(error)


def hits(scores, own):
  """{'top1': shares of draws [n] in which the own caption is first, 'top5': of the first five}."""
  return {f'top{first}': retrieval(scores, own, first) for first in (1, 5)}


def row(shares, clusters):
  """{'top1': (mean, standard error), 'top5': ...} of `hits`."""
  return {name: mean_and_error(share, clusters) for name, share in shares.items()}


def shuffled(scores, seed):
  """The `row` of pictures each with a caption drawn at random, a mean of `SHUFFLES` draws."""
  count, pool = scores.shape
  draws = np.random.default_rng(seed).integers(pool, size=(SHUFFLES, count))
  shares = [hits(scores, own) for own in draws]
  mean = {name: np.mean([share[name] for share in shares], axis=0) for name in shares[0]}
  return row(mean, np.arange(count))


def check(images, captions, pool):
  """Raises ValueError where pictures, their captions and those to choose among do not fit."""
  if images.shape[1:] != (SIDE, SIDE, 3) or images.dtype != np.uint8:
    raise ValueError(f'samples are uint8 [n {SIDE} {SIDE} 3], not {images.dtype} {images.shape}')
  if len(images) != len(captions):
    raise ValueError(f'{len(images)} samples have {len(captions)} captions: give one for each')
  if len(set(pool)) < AMONG:
    raise ValueError(f'{len(set(pool))} captions are too few to choose among {AMONG}')
  unknown = [c for c in captions if c not in set(pool)]
  if unknown:
    raise ValueError(
      f'{len(unknown)} captions are not of the test split, the first {unknown[0]!r}: the judge '
      'knows the train captions, so ask for those of the test split'
    )


def score(judge, images, captions, test, train, seed=0):
  """The figures of pictures, uint8 [n 64 64 3], with a caption of the test `Set` each, as a dict.

  test, train: the real ones. Raises ValueError for what does not fit, see `check`.
  """
  check(images, captions, test.captions)
  place = {caption: i for i, caption in enumerate(test.captions)}
  own = np.array([place[c] for c in captions])
  bases = np.asarray(test.bases)[own]
  pool = encode_captions(judge, test.captions).T  # [d m]
  scores = encode_images(judge, images) @ pool
  found, real = hits(scores, own), hits(encode_images(judge, test.images[own]) @ pool, own)
  seen, _ = draw(train, len(test.captions), seed)
  known = encode_images(judge, seen.images) @ encode_captions(judge, seen.captions).T
  return {
    'samples': row(found, bases),
    'real': row(real, bases),
    'behind': row({name: real[name] - found[name] for name in found}, bases),
    'shuffled': shuffled(scores, seed),
    'train': row(hits(known, np.arange(len(known))), seen.bases),
  }


def table(result):
  lines = [f'{"":10}{"top-1":>16}{"top-5":>16}   of {AMONG} captions, percent']
  for name, figures in result.items():
    cells = (f'{100 * mean:.1f} ± {100 * error:.1f}' for mean, error in figures.values())
    lines.append(f'{name:10}' + ''.join(f'{cell:>16}' for cell in cells))
  return '\n'.join(lines)


# --- commands -------------------------------------------------------------------------------------


def read_captions(path):
  """The captions of a .txt file, a line each, or of a .jsonl file, the `caption` of each line."""
  lines = pathlib.Path(path).read_text(encoding='utf-8').splitlines()
  if not str(path).endswith('.jsonl'):
    return lines
  try:
    return [json.loads(line)['caption'] for line in lines]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{path} has a line that is no JSON object with a caption: {error}') from error


def read_samples(path):
  with np.load(path) as file:
    if 'arr_0' not in file:
      raise ValueError(f'{path} holds {", ".join(file)}, and no arr_0, the pictures')
    return file['arr_0']


def train_command(args):
  data, held = emoji('train'), None
  if args.hold:
    held, data = draw(data, args.hold * len(data.captions), seed=123)
  judge = train(data, args.steps, seed=args.seed)
  save(judge, args.out)
  if held:
    judge = load(args.out)
    print(table({'held out': score(judge, held.images, held.captions, held, data)['real']}))


def score_command(args):
  judge, test = load(args.judge), emoji('test')
  images, captions = read_samples(args.samples), read_captions(args.captions)
  result = score(judge, images, captions, test, emoji('train'), args.seed)
  print(table(result))
  out = args.out or pathlib.Path(args.samples).with_suffix('.judged.json')
  out.write_text(json.dumps(result, indent=2) + '\n')
  print(f'wrote {out}')


def captions_command(args):
  args.out.write_text('\n'.join(emoji('test').captions) + '\n', encoding='utf-8')


def main(argv=None):
  parser = argparse.ArgumentParser(description='The judge of text-to-image on the emoji.')
  commands = parser.add_subparsers(required=True)
  command = commands.add_parser('train')
  command.set_defaults(run=train_command)
  command.add_argument('--out', type=pathlib.Path, required=True)
  command.add_argument('--steps', type=int, default=STEPS)
  command.add_argument('--hold', type=float, default=0, help='share of train kept to choose by')
  command = commands.add_parser('captions')
  command.set_defaults(run=captions_command)
  command.add_argument('--out', type=pathlib.Path, required=True, help='.txt of the test split')
  command = commands.add_parser('score')
  command.set_defaults(run=score_command)
  command.add_argument('--judge', type=pathlib.Path, required=True)
  command.add_argument('--samples', required=True, help='.npz with arr_0, uint8 [n 64 64 3]')
  command.add_argument('--captions', required=True, help='.txt or .jsonl, one for each sample')
  command.add_argument('--out', type=pathlib.Path, help='.json; default beside the samples')
  for command in commands.choices.values():
    command.add_argument('--seed', type=int, default=0)
  args = parser.parse_args(argv)
  try:
    args.run(args)
  except (OSError, ValueError) as error:
    sys.exit(f'judge: {error}')


if __name__ == '__main__':
  main()
