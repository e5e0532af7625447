"""The metrics by the libraries that people report them with, on sets that anyone can draw.

  pip install torch==2.13.0 scipy==1.17.1 scikit-learn==1.9.1
  pip install --no-deps pytorch-fid==0.3.0 clean-fid==0.1.35 torch-fidelity==0.4.0 prdc==0.2
  python tests/golden/metrics.py            # writes tests/golden/metrics.npz

Sets are drawn by numpy from the name of the case, so that the file holds outputs alone. All
libraries get the values in float64: some would otherwise keep float32 and lose the digits that
`tests/test_metrics.py` is about.
"""

import pathlib
import sys
from unittest import mock
import zlib

import numpy as np

NEIGHBOURS = (1, 3, 5)
SPLITS = 4


def correlated(rng, count, width):
  return rng.standard_normal((count, width)) @ rng.standard_normal((width, width)) / width**0.5


def sets(name):
  """Two sets (fake, real) [n d] of one size, float32 values."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  if name == 'plain':
    x, y = correlated(rng, 300, 16) + 0.3, correlated(rng, 300, 16)
  elif name == 'wide':  # more columns than rows: singular covariances
    x, y = rng.standard_normal((2, 50, 96)) ** 2
  elif name == 'heavy':  # rows a thousand times as far out as others
    x, y = rng.standard_t(1.5, (2, 200, 12))
  elif name == 'far':  # distances of 1 at 1000 from the origin
    x, y = 1000 + rng.standard_normal((2, 200, 24))
    y = y + 0.2
  elif name == 'clusters':  # two tight ones far apart: centring leaves each far from the origin
    x, y = 1e-3 * rng.standard_normal((2, 200, 24)) + 100.0 * (rng.random((2, 200, 1)) < 0.5)
  elif name == 'duplicated':  # rows several times, and some of them in either set
    rows = rng.standard_normal((60, 8))
    x, y = rows[rng.integers(0, 40, 150)], rows[rng.integers(20, 60, 150)]
  return x.astype(np.float32), y.astype(np.float32)


CASES = ('plain', 'wide', 'heavy', 'far', 'clusters', 'duplicated')


def logits():
  """[n k] of confident and of doubtful rows, and the order in which rows are dealt to splits."""
  rng = np.random.default_rng(zlib.crc32(b'logits'))
  rows = rng.standard_normal((210, 12)) * np.exp(2 * rng.standard_normal((210, 1)))
  return rows.astype(np.float32), np.random.default_rng(0).permutation(len(rows))


def main():
  # only their networks need torchvision, whose builds are tied to torch's; arithmetic does not
  for part in ('', '.transforms', '.transforms.functional', '.models', '.models.inception',
               '.datasets'):
    sys.modules.setdefault(f'torchvision{part}', mock.MagicMock())

  from cleanfid import fid as clean
  import prdc
  from pytorch_fid import fid_score
  import scipy
  import sklearn
  from sklearn import neighbors
  from sklearn.metrics import pairwise
  import torch
  import torch_fidelity
  from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

  outputs = {}
  for name in CASES:
    x, y = (rows.astype(np.float64) for rows in sets(name))
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    means, covs = [r.mean(0) for r in (x, y)], [np.cov(r, rowvar=False) for r in (x, y)]
    root = scipy.linalg.sqrtm(covs[0] @ covs[1])
    four = means[0], covs[0], means[1], covs[1]
    outputs[f'{name}/frechet/scipy'] = (
      np.sum((means[0] - means[1]) ** 2) + np.trace(covs[0] + covs[1] - 2 * root.real))
    outputs[f'{name}/frechet/pytorch_fid'] = fid_score.calculate_frechet_distance(*four)
    outputs[f'{name}/frechet/cleanfid'] = clean.frechet_distance(*four)
    outputs[f'{name}/frechet/torch_fidelity'] = metric_fid.fid_statistics_to_metric(
      *({'mu': mean, 'sigma': cov} for mean, cov in zip(means, covs)), verbose=False,
    )['frechet_inception_distance']

    own = [pairwise.polynomial_kernel(r, degree=3, coef0=1) for r in (x, y)]
    cross = pairwise.polynomial_kernel(x, y, degree=3, coef0=1)
    n = len(x)
    outputs[f'{name}/kernel/sklearn'] = (
      sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in own) - 2 * cross.mean())
    outputs[f'{name}/kernel/torch_fidelity'] = metric_kid.kid_features_to_metric(
      *tensors, kid_subsets=1, kid_subset_size=n, verbose=False)['kernel_inception_distance_mean']
    outputs[f'{name}/kernel/cleanfid'] = clean.kernel_distance(x, y, 1, n)

    for k in NEIGHBOURS:
      values = prdc.compute_prdc(y, x, k)
      outputs[f'{name}/prdc/{k}'] = [
        values[key] for key in ('precision', 'recall', 'density', 'coverage')]
      values = metric_prc.prc_features_to_metric(
        *tensors, prc_neighborhood=k, save_cpu_ram=False, verbose=False)
      outputs[f'{name}/prc/{k}'] = [values['precision'], values['recall']]
    tree = neighbors.NearestNeighbors(n_neighbors=6, algorithm='kd_tree').fit(y)  # by differences
    outputs[f'{name}/nearest'] = tree.kneighbors(x)[0]

  rows, order = logits()
  for splits in (1, SPLITS):
    values = metric_isc.isc_features_to_metric(
      torch.from_numpy(rows[order].astype(np.float64)), splits, shuffle=False)
    outputs[f'inception_score/{splits}'] = [
      values['inception_score_mean'], values['inception_score_std']]

  versions = ', '.join(f'{m.__name__} {m.__version__}' for m in (
    np, scipy, sklearn, torch, torch_fidelity)) + ', pytorch_fid 0.3.0, clean-fid 0.1.35, prdc 0.2'
  np.savez_compressed(pathlib.Path(__file__).with_suffix('.npz'), versions=versions, **outputs)
  print(versions)
  for name, value in outputs.items():
    print(name, value if np.size(value) < 5 else np.shape(value))


if __name__ == '__main__':
  main()
