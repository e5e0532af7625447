"""The judge of experiments/emoji_text2image, on coloured squares."""

import importlib.util
import itertools
import json
import math

import jax
import numpy as np
import pytest
import run_diffax

PATH = run_diffax.ROOT / 'experiments' / 'emoji_text2image' / 'judge.py'
spec = importlib.util.spec_from_file_location('judge', PATH)
judges = importlib.util.module_from_spec(spec)
spec.loader.exec_module(judges)

COLOURS = {
  'red': (220, 20, 20), 'green': (20, 160, 20), 'blue': (20, 20, 220), 'yellow': (240, 220, 0),
  'black': (0, 0, 0), 'grey': (128, 128, 128), 'pink': (250, 150, 190), 'brown': (120, 70, 20),
  'cyan': (0, 220, 220), 'violet': (130, 0, 180),
}
PLACES = {
  'top left': (4, 4), 'top right': (4, 36), 'bottom left': (36, 4), 'bottom right': (36, 36),
  'in the middle': (20, 20), 'nowhere else': (4, 20),
}
SMALL = dict(widths=(16, 16, 32, 32), width=32, dropout=0.0, forget=0.0)


def squares(repeats, seed):
  """A `Set` of squares of 10 colours in 6 places, each caption `repeats` times."""
  rng = np.random.default_rng(seed)
  pairs = list(itertools.product(COLOURS, PLACES)) * repeats
  images = np.full((len(pairs), 64, 64, 3), 255, np.uint8)
  for image, (colour, place) in zip(images, pairs):
    top, left = PLACES[place] + rng.integers(-3, 4, 2)
    image[top : top + 24, left : left + 24] = COLOURS[colour]
  captions = [f'{colour} square, {place}' for colour, place in pairs]
  return judges.Set(images, captions, captions, [colour for colour, _ in pairs])


@pytest.fixture(scope='module')
def judge():
  return judges.train(squares(2, seed=0), steps=120, batch=60, design=SMALL)


def test_squares_find_their_captions(judge):
  test = squares(1, seed=1)
  result = judges.score(judge, test.images, test.captions, test, squares(1, seed=0))
  assert result['samples']['top1'][0] > 0.95
  assert result['samples'] == result['real'] and result['train']['top1'][0] > 0.95
  mean, error = result['shuffled']['top1']
  assert 0 < error < 0.02 and abs(mean - 0.02) < 3 * error
  mean, error = result['shuffled']['top5']
  assert 0 < error < 0.04 and abs(mean - 0.1) < 3 * error


def test_pictures_of_other_captions_are_found_out(judge):
  """Half of the pictures under others' captions halve the figure, of the samples alone."""
  test = squares(1, seed=1)
  wrong = np.roll(np.arange(30), 7)
  images = np.concatenate([test.images[wrong], test.images[30:]])
  result = judges.score(judge, images, test.captions, test, squares(1, seed=0))
  assert abs(result['samples']['top1'][0] - 0.5) < 0.05
  assert result['real']['top1'][0] > 0.95
  behind, error = result['behind']['top1']
  assert abs(behind - 0.5) < 0.05 and 0 < error < 0.1


def test_saved_judge_scores_alike(judge, tmp_path):
  judges.save(judge, tmp_path / 'judge')
  loaded, test = judges.load(tmp_path / 'judge'), squares(1, seed=1)
  vectors = [judges.encode_images(j, test.images) for j in (judge, loaded)]
  np.testing.assert_allclose(*vectors, atol=0.02)
  vectors = [judges.encode_captions(j, test.captions) for j in (judge, loaded)]
  np.testing.assert_allclose(*vectors, atol=0.02)


def test_seeds_repeat(judge):
  test, train = squares(1, seed=1), squares(1, seed=0)
  again = lambda seed: judges.score(judge, test.images, test.captions, test, train, seed)
  assert again(3) == again(3)
  assert again(3)['shuffled'] != again(4)['shuffled']
  parts = [judges.draw(train, 20, seed)[0].captions for seed in (0, 0, 1)]
  assert parts[0] == parts[1] != parts[2]


def test_training_repeats():
  data = squares(1, seed=0)
  a, b = (judges.train(data, steps=3, batch=8, seed=1, design=SMALL).params for _ in range(2))
  assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), a, b))


def test_retrieval_is_the_mean_of_draws():
  """Against draws one by one, and in closed cases."""
  rng = np.random.default_rng(0)
  scores, own = rng.normal(size=(3, 12)), np.array([4, 0, 4])
  hits = np.zeros(3)
  for i, o in enumerate(own):
    others = np.delete(scores[i], o)
    draws = list(itertools.combinations(others, 5))
    hits[i] = np.mean([sum(s >= scores[i, o] for s in draw) < 2 for draw in draws])
  np.testing.assert_allclose(judges.retrieval(scores, own, first=2, among=6), hits, atol=1e-12)
  best, worst = np.eye(1, 60), -np.eye(1, 60)
  assert judges.retrieval(best, np.array([0])) == 1
  assert judges.retrieval(worst, np.array([0])) == 0
  assert judges.retrieval(np.zeros((1, 60)), np.array([0])) == 0  # all alike tells nothing


def test_error_counts_clusters():
  """Six copies of each of n coins are n coins."""
  coins = np.array([1.0, 0, 1, 1, 0, 0, 1, 0])
  mean, error = judges.mean_and_error(coins, np.arange(8))
  assert mean == 0.5 and math.isclose(error, np.std(coins, ddof=1) / math.sqrt(8))
  again = judges.mean_and_error(np.repeat(coins, 6), np.repeat(np.arange(8), 6))
  np.testing.assert_allclose(again, (mean, error))


def test_terms():
  found = judges.terms('kiss: man, man, medium-light skin tone, dark skin tone')
  assert {'<kiss>', '<medium-light>', '<ki', 'man man', '@1 man', '@3 medium-light skin tone',
          '@4 dark skin tone', '@last dark skin tone', 'kiss^', 'tone$'} <= found
  assert '<medium>' not in found and '<light>' not in found


def write(folder, images, captions):
  np.savez(folder / 'samples.npz', arr_0=images)
  (folder / 'captions.txt').write_text(''.join(f'{c}\n' for c in captions), encoding='utf-8')
  lines = [json.dumps({'caption': c}) + '\n' for c in captions]
  (folder / 'captions.jsonl').write_text(''.join(lines), encoding='utf-8')


@pytest.fixture
def emoji_of_squares(tmp_path, monkeypatch):
  """A folder of data in the emoji's form, of squares."""
  folder = tmp_path / 'data' / 'emoji'
  folder.mkdir(parents=True)
  splits = {'train': squares(1, seed=0), 'test': squares(1, seed=1)}
  np.savez(folder / 'emoji64.npz', image=np.concatenate([s.images for s in splits.values()]))
  records = [
    {'caption': caption, 'base': base, 'subgroup': subgroup, 'split': split}
    for split, data in splits.items() for caption, base, subgroup in zip(*data[1:])
  ]
  lines = [json.dumps({'index': i, **record}) for i, record in enumerate(records)]
  (folder / 'captions.jsonl').write_text('\n'.join(lines) + '\n')
  monkeypatch.setenv('DIFFAX_DATA', str(folder.parent))
  return splits


@pytest.mark.parametrize('kind', ['txt', 'jsonl'])
def test_score_command(judge, emoji_of_squares, tmp_path, capsys, kind):
  judges.save(judge, tmp_path / 'judge')
  test = emoji_of_squares['test']
  write(tmp_path, test.images[10:], test.captions[10:])
  judges.main(['score', '--judge', str(tmp_path / 'judge'),
               '--samples', str(tmp_path / 'samples.npz'),
               '--captions', str(tmp_path / f'captions.{kind}')])
  result = json.loads((tmp_path / 'samples.judged.json').read_text())
  assert set(result) == {'samples', 'real', 'behind', 'shuffled', 'train'}
  assert result['samples'] == result['real'] and result['behind']['top1'] == [0, 0]
  assert f'{100 * result["samples"]["top1"][0]:.1f} ±' in capsys.readouterr().out


def test_score_command_says_what_is_wrong(judge, emoji_of_squares, tmp_path):
  judges.save(judge, tmp_path / 'judge')
  test = emoji_of_squares['test']
  write(tmp_path, test.images, test.captions[:-1])
  with pytest.raises(SystemExit) as stop:
    judges.main(['score', '--judge', str(tmp_path / 'judge'),
                 '--samples', str(tmp_path / 'samples.npz'),
                 '--captions', str(tmp_path / 'captions.txt')])
  assert str(stop.value) == 'judge: 60 samples have 59 captions: give one for each'


GOOD = squares(1, seed=0)
WRONG = {
  'counts': (GOOD.images, GOOD.captions[:-1], GOOD.captions, ['60 samples', '59 captions']),
  'few': (GOOD.images[:9], GOOD.captions[:9], GOOD.captions[:49], ['49 captions', 'among 50']),
  'repeated': (GOOD.images[:1], GOOD.captions[:1], GOOD.captions[:1] * 60, ['1 captions']),
  'size': (GOOD.images[:, ::2, ::2], GOOD.captions, GOOD.captions, ['64 64 3', '32, 32, 3']),
  'dtype': (GOOD.images / 255, GOOD.captions, GOOD.captions, ['uint8', 'float64']),
  'unknown': (GOOD.images, ['a cat', *GOOD.captions[1:]], GOOD.captions, ['a cat', 'test split']),
}


def test_bad_files(tmp_path):
  (tmp_path / 'captions.jsonl').write_text('{"caption": "a cat"}\n{"text": "a dog"}\n')
  with pytest.raises(ValueError, match='captions.jsonl .* caption'):
    judges.read_captions(tmp_path / 'captions.jsonl')
  np.savez(tmp_path / 'samples.npz', images=np.zeros(3))
  with pytest.raises(ValueError, match='images, and no arr_0'):
    judges.read_samples(tmp_path / 'samples.npz')


@pytest.mark.parametrize('case', WRONG)
def test_bad_input(case):
  images, captions, pool, said = WRONG[case]
  with pytest.raises(ValueError) as error:
    judges.check(images, captions, pool)
  assert all(word in str(error.value) for word in said) and '\n' not in str(error.value)


def test_missing_data_and_judge(tmp_path, monkeypatch):
  monkeypatch.setenv('DIFFAX_DATA', str(tmp_path))
  with pytest.raises(ValueError, match='DIFFAX_DATA'):
    judges.emoji('test')
  with pytest.raises(ValueError, match='train --out'):
    judges.load(tmp_path)


def test_emoji(data_dir, monkeypatch):
  """No skin-tone sibling of a train picture is held out, of the data or of a part drawn from it;
  and the judge in the repository finds test pictures' captions twenty times as often as chance.
  """
  if not (data_dir / 'emoji').is_dir():
    pytest.skip(f'no emoji in {data_dir}')
  monkeypatch.setenv('DIFFAX_DATA', str(data_dir))
  train, test = judges.emoji('train'), judges.emoji('test')
  assert (len(train.captions), len(test.captions)) == (3483, 438)
  assert len(set(test.captions)) == 438 and not set(train.bases) & set(test.bases)
  held, rest = judges.draw(train, 700, seed=0)
  assert len(held.captions) + len(rest.captions) == 3483 and not set(held.bases) & set(rest.bases)
  assert 680 < len(held.captions) < 740
  judge = judges.load(PATH.parent / 'judge')  # the one that the README tells of
  result = judges.score(judge, test.images, test.captions, test, train)
  assert result['real']['top1'][0] > 0.4 and abs(result['shuffled']['top1'][0] - 0.02) < 0.01
