"""Serving: one file that any JAX process can run, without Flax and without the model.

Importing this package imports neither Flax nor optax: what loads and runs a model
needs JAX and NumPy only. Layers of Flax are imported at their first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sparsejax.serving._file import ServingError
from sparsejax.serving.block_sparse import block_sparse_conv, block_sparse_linear
from sparsejax.serving.block_sparse_choice import Measured, measure_forms
from sparsejax.serving.block_sparse_index import Block, Blocks
from sparsejax.serving.condensed import Condensed, condense, condensed_linear
from sparsejax.serving.export import export
from sparsejax.serving.load import ServedModel, load

if TYPE_CHECKING:
    from sparsejax.serving.block_sparse_layers import (
        BlockSparseConv,
        BlockSparseLinear,
    )
    from sparsejax.serving.block_sparse_swap import Swapped, with_blocks
    from sparsejax.serving.condensed_layers import CondensedLinear

__all__ = [
    "Block",
    "BlockSparseConv",
    "BlockSparseLinear",
    "Blocks",
    "Condensed",
    "CondensedLinear",
    "Measured",
    "ServedModel",
    "ServingError",
    "Swapped",
    "block_sparse_conv",
    "block_sparse_linear",
    "condense",
    "condensed_linear",
    "export",
    "load",
    "measure_forms",
    "with_blocks",
]

_OF_FLAX = {
    "BlockSparseConv": "block_sparse_layers",
    "BlockSparseLinear": "block_sparse_layers",
    "CondensedLinear": "condensed_layers",
    "Swapped": "block_sparse_swap",
    "with_blocks": "block_sparse_swap",
}


def __getattr__(name: str) -> Any:
    if name in _OF_FLAX:
        module = importlib.import_module(f"{__name__}.{_OF_FLAX[name]}")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
