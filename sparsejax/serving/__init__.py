"""Serving: one file that any JAX process can run, without Flax and without the model.

Importing this package imports neither Flax nor optax: what loads and runs a model
needs JAX and NumPy only.
"""

from sparsejax.serving._file import ServingError
from sparsejax.serving.export import export
from sparsejax.serving.load import ServedModel, load

__all__ = ["ServedModel", "ServingError", "export", "load"]
