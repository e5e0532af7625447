"""diffax: diffusion models in JAX, from a noise schedule in a notebook to a run on a pod."""

__version__ = '0.1.0'
