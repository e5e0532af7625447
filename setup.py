"""Installs diffax; see README.md."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (HERE / 'diffax' / '__init__.py').read_text()).group(1)

setup(
    name='diffax',
    version=VERSION,
    description='Diffusion models in JAX and Flax, from a notebook to a pod',
    long_description=(HERE / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['diffax', 'diffax.*']),
    python_requires='>=3.11',
    install_requires=[
        'absl-py>=2.1',
        'array_record>=0.8',
        'einops>=0.8',
        'etils[epath]>=1.9',
        'flax>=0.12,<0.14',
        'grain>=0.2.12',
        'jax>=0.10,<0.13',
        'matplotlib>=3.9',
        'ml_collections>=1.0',
        'numpy>=2.0',
        'optax>=0.2.5',
        'orbax-checkpoint>=0.11.30',
        'pillow>=11.0',
        'safetensors>=0.5',
        'scikit-learn>=1.5',
        'tensorboardX>=2.6.2',
        'tensorflow-datasets>=4.9.9',  # without TensorFlow: data_source reads array_record files
        'tokenizers>=0.21',
        'tqdm>=4.66',
    ],
    extras_require={
        'cuda': ['jax[cuda12]'],
        'tpu': ['jax[tpu]'],
        'gcs': ['gcsfs', 'google-cloud-storage'],  # gs:// workdirs and their TensorBoard events
        'diffrax': ['diffrax>=0.6'],  # solvers.sample_diffrax
        'test': ['diffrax>=0.6', 'ipykernel>=6.29', 'kubeflow-trainer-api>=2.0',  # JobSet's schema
                 'nbclient>=0.10', 'nbformat>=5.10', 'pytest>=8.0', 'pytest-xdist>=3.6',
                 'pyyaml>=6.0', 'ruff>=0.9', 'tensorboard>=2.18'],
        'benchmark': ['torch>=2.4'],
        'tokamax': ['tokamax>=0.0.12'],  # attention='tokamax', on GPUs and TPUs
    },
)
