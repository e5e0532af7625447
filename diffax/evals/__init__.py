"""Evaluations: named entries of a config's `evals`, run inside training every so many steps.

An evaluation is a function `(run, path, **its settings) -> evaluate` in a file of its own in this
package, where `evaluate(state)` yields `(name, value)`: pictures, uint8 [h w c].
"""
