"""Sparse training as optax transformations: one line in any pipeline."""

from sparsejax.sparse_optax._core import SparseState
from sparsejax.sparse_optax._masks import apply_masks, get_masks, reinitialize
from sparsejax.sparse_optax.chase import chase
from sparsejax.sparse_optax.magnitude import magnitude
from sparsejax.sparse_optax.rigl import rigl
from sparsejax.sparse_optax.set import set  # noqa: A004
from sparsejax.sparse_optax.srigl import srigl
from sparsejax.sparse_optax.static import static

__all__ = [
    "SparseState",
    "apply_masks",
    "chase",
    "get_masks",
    "magnitude",
    "reinitialize",
    "rigl",
    "set",
    "srigl",
    "static",
]
