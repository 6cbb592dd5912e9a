"""The layers of Flax NNX whose kernels are dense blocks."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from sparsejax.serving.block_sparse import (
    Form,
    Padding,
    block_sparse_conv,
    block_sparse_linear,
)
from sparsejax.serving.block_sparse_index import Blocks


class _BlockSparse(nnx.Module):
    """Weights of blocks and a bias."""

    def __init__(
        self,
        weights: Sequence[jax.Array],
        bias: jax.Array | None,
        blocks: Blocks,
        *,
        form: Form,
        dtype: Any = None,
        precision: lax.PrecisionLike = None,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
    ):
        self.weights = nnx.List([nnx.Param(weight) for weight in weights])
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))
        self.blocks = blocks
        self.form = form
        self.dtype = dtype
        self.precision = precision
        self.promote_dtype = promote_dtype

    def kernel(self) -> jax.Array:
        """Return the kernel of the dense layer, with zeros outside of the blocks."""
        return self.blocks.join([weight[...] for weight in self.weights])

    def _apply(self, function: Callable[..., jax.Array], x: jax.Array, **options: Any):
        weights = [weight[...] for weight in self.weights]
        bias = None if self.bias is None else self.bias[...]
        x, bias, *weights = self.promote_dtype((x, bias, *weights), dtype=self.dtype)
        own = {"form": self.form, "precision": self.precision}
        y = function(x, weights, self.blocks, **own, **options)
        return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


class BlockSparseConv(_BlockSparse):
    """A convolution of images by the blocks of its kernel.

    It computes what ``nnx.Conv`` with the kernel ``layer.kernel()`` computes; see
    `block_sparse_conv`. Its parameters are ``weights``, a list of one array
    [rows, columns] for each block, and ``bias``.

    Args:
      weights: of each block, [rows, columns]; ``blocks.split(kernel)``.
      bias: [out], or None.
      blocks: where they stand in the kernel [kh, kw, in, out].
      strides: as in `block_sparse_conv`.
      padding: as in `block_sparse_conv`.
      form: as in `block_sparse_conv`.
      dtype: of the computation; None: that of input and parameters.
      precision: of the products.
      promote_dtype: as in ``nnx.Conv``.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from sparsejax import serving
      >>> rows, columns = np.array([0, 2, 3]), np.array([1, 4, 5, 9])
      >>> blocks = serving.Blocks((3, 3, 2, 4), [(rows, columns)])
      >>> weights = blocks.split(jnp.ones((3, 3, 2, 4)))
      >>> layer = serving.BlockSparseConv(weights, jnp.ones(4), blocks, strides=2)
      >>> layer(jnp.ones((5, 8, 8, 2))).shape
      (5, 4, 4, 4)
    """

    def __init__(
        self,
        weights: Sequence[jax.Array],
        bias: jax.Array | None,
        blocks: Blocks,
        *,
        strides: int | Sequence[int] = 1,
        padding: Padding = "SAME",
        form: Form = "rows",
        **options: Any,
    ):
        super().__init__(weights, bias, blocks, form=form, **options)
        self.strides = _fixed(strides)
        self.padding = _fixed(padding)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [..., h', w', out] for x [..., h, w, in]."""
        images = x if x.ndim == 4 else x.reshape(-1, *x.shape[-3:])
        options = {"strides": self.strides, "padding": self.padding}
        y = self._apply(block_sparse_conv, images, **options)
        return y if x.ndim == 4 else y.reshape(*x.shape[:-3], *y.shape[1:])


def _fixed(option: Any) -> Any:
    """Return nested lists as tuples, which a module holds as static."""
    return tuple(map(_fixed, option)) if isinstance(option, list | tuple) else option


class BlockSparseLinear(_BlockSparse):
    """A linear layer by the blocks of its kernel.

    It computes what ``nnx.Linear`` with the kernel ``layer.kernel()`` computes; see
    `block_sparse_linear` and `BlockSparseConv`.

    Args:
      weights: of each block, [rows, columns]; ``blocks.split(kernel)``.
      bias: [out], or None.
      blocks: where they stand in the kernel [in, out].
      form: as in `block_sparse_linear`.
      dtype: of the computation; None: that of input and parameters.
      precision: of the products.
      promote_dtype: as in ``nnx.Linear``.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from sparsejax import serving
      >>> blocks = serving.Blocks((6, 4), [(np.array([0, 3]), np.array([1, 4, 5]))])
      >>> weights = blocks.split(jnp.ones((6, 4)))
      >>> layer = serving.BlockSparseLinear(weights, None, blocks)
      >>> layer(jnp.ones((1, 6))).tolist()
      [[3.0, 0.0, 0.0, 3.0]]
    """

    def __init__(
        self,
        weights: Sequence[jax.Array],
        bias: jax.Array | None,
        blocks: Blocks,
        *,
        form: Form = "gathered",
        **options: Any,
    ):
        super().__init__(weights, bias, blocks, form=form, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [..., out] for x [..., in]."""
        return self._apply(block_sparse_linear, x)
