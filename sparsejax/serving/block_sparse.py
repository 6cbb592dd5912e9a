"""Convolutions and linear layers computed from dense blocks of their kernels.

A kernel ``[kh, kw, in, out]`` is seen as a matrix ``[out, kh * kw * in]``; what is not
zero lies in `Blocks`, each of some rows and some columns. A block costs as many
multiply-adds as it has weights, and the columns that it reads of the input have to be
gathered. How that is best done depends on the layer and the device, so that there are
three forms, of the same result:

- "gathered": for each block, all that it reads is gathered, and multiplied at once.
- "padded": all blocks are filled up to the largest, for one batched product.
- "rows": for each block, one row of the output image after another, so that what is
  gathered stays in a cache.

The input is unfolded with the batch as last axis, so that what is gathered are long
vectors, and in width only: what an output row reads is the rows of the image one after
another, whichever output row it is.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax.serving.block_sparse_index import Blocks

Form = Literal["gathered", "padded", "rows"]
FORMS: tuple[Form, ...] = get_args(Form)
Padding = str | int | Sequence[int | tuple[int, int]]


def block_sparse_conv(
    x: jax.Array,
    weights: Sequence[jax.Array],
    blocks: Blocks,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    form: Form = "rows",
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Convolve images with a kernel of which only the blocks are not zero.

    It equals ``lax.conv_general_dilated`` with the kernel ``blocks.join(weights)``, to
    rounding, and so do its derivatives. Output channels of no block are zero.

    Args:
      x: float [batch, h, w, in].
      weights: of each block, float [rows, columns]; ``blocks.split(kernel)``.
      blocks: where the weights stand in a kernel [kh, kw, in, out].
      strides: pixels from one output to the next, one number or two.
      padding: "SAME", "VALID", a number of zeros for all sides, or for each of the two
        axes such a number or a pair (before, after).
      form: how it is computed, see the module; it does not change the result.
      precision: of the products.

    Returns:
      float [batch, h', w', out].

    Raises:
      ValueError: the input, a weight or an option does not fit the blocks.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from sparsejax import serving
      >>> first = np.array([0, 2]), np.array([1, 4, 5])  # rows, columns
      >>> blocks = serving.Blocks((3, 3, 2, 4), [first, (np.array([3]), np.array([0]))])
      >>> weights = blocks.split(jnp.ones((3, 3, 2, 4)))
      >>> y = serving.block_sparse_conv(jnp.ones((1, 8, 8, 2)), weights, blocks)
      >>> y.shape, y[0, 4, 4].tolist()
      ((1, 8, 8, 4), [3.0, 0.0, 3.0, 1.0])
    """
    where = "block_sparse_conv"
    if len(blocks.shape) != 4 or x.ndim != 4 or x.shape[-1] != blocks.shape[2]:
        raise ValueError(
            f"{where} needs images [batch, h, w, in] and blocks of a kernel "
            f"[kh, kw, in, out], got {x.shape} and blocks of {blocks.shape}."
        )
    _check(where, weights, blocks, form)
    size = blocks.shape[:2]
    unfolded = _unfold_width(x, size, *window(x.shape[1:3], size, strides, padding))
    out = _RUN[form](unfolded, weights, blocks, precision)
    out = out.reshape(blocks.n_rows, unfolded.height, -1, x.shape[0])
    return out.transpose(3, 1, 2, 0)


def block_sparse_linear(
    x: jax.Array,
    weights: Sequence[jax.Array],
    blocks: Blocks,
    *,
    form: Form = "gathered",
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Multiply vectors by a kernel of which only the blocks are not zero.

    Args:
      x: float [..., in].
      weights: as for `block_sparse_conv`.
      blocks: where the weights stand in a kernel [in, out].
      form: as for `block_sparse_conv`; "rows" takes all vectors for one row.
      precision: of the products.

    Returns:
      float [..., out].

    Raises:
      ValueError: as for `block_sparse_conv`.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from sparsejax import serving
      >>> blocks = serving.Blocks((3, 2), [(np.array([1]), np.array([0, 2]))])
      >>> weights = blocks.split(jnp.ones((3, 2)))
      >>> serving.block_sparse_linear(jnp.array([1.0, 2.0, 3.0]), weights, blocks)
      Array([0., 4.], dtype=float32)
    """
    where = "block_sparse_linear"
    if len(blocks.shape) != 2 or not x.ndim or x.shape[-1] != blocks.shape[0]:
        raise ValueError(
            f"{where} needs vectors [..., in] and blocks of a kernel [in, out], got "
            f"{x.shape} and blocks of {blocks.shape}."
        )
    _check(where, weights, blocks, form)
    vectors = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    unfolded = _Unfolded(vectors.T, step=x.shape[-1], height=1, stride=1)
    out = _RUN[form](unfolded, weights, blocks, precision).T
    return out if x.ndim == 2 else out.reshape(*x.shape[:-1], blocks.n_rows)


def window(
    image: Sequence[int],
    size: Sequence[int],
    strides: int | Sequence[int],
    padding: Padding,
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Return strides and padding for each axis of an image.

    Args:
      image: height and width.
      size: those of the kernel.
      strides: as in `block_sparse_conv`.
      padding: as in `block_sparse_conv`.
    """
    steps = (strides, strides) if isinstance(strides, int) else tuple(strides)
    if isinstance(padding, str):
        return steps, tuple(lax.padtype_to_pads(image, size, steps, padding))
    sides = (padding, padding) if isinstance(padding, int) else padding
    pair = lambda side: (side, side) if isinstance(side, int) else side
    return steps, tuple(map(pair, sides))


class _Unfolded(NamedTuple):
    """Images unfolded in width: kernel columns of an image row are rows of the array.

    Those for row y of the output are ``step * stride * y + arange(n_columns)``.
    """

    array: jax.Array  # [h * step, w' * batch], h with padding
    step: int  # kw * in
    height: int  # of the output
    stride: int


def _unfold_width(x, size, strides, pads) -> _Unfolded:
    (kh, kw), (down, right) = size, strides
    if kh == kw == 1 and not np.any(pads):
        x, down, right = x[:, ::down, ::right], 1, 1  # nothing else is read
    # The transposition is kept apart from what follows: fused with it, it costs XLA's
    # CPU back-end three times as much as both.
    x = lax.optimization_barrier(x.transpose(1, 3, 2, 0))
    x = jnp.pad(x, (pads[0], (0, 0), pads[1], (0, 0)))
    h, n_in, w, batch = x.shape
    height, width = (h - kh) // down + 1, (w - kw) // right + 1
    if height < 1 or width < 1:
        raise ValueError(
            f"block_sparse_conv needs images, with padding, of at least {kh} x {kw} "
            f"pixels, as the kernel has, got {h} x {w}."
        )
    reach = (width - 1) * right + 1
    array = jnp.concatenate([x[:, :, s : s + reach : right] for s in range(kw)], axis=1)
    return _Unfolded(array.reshape(-1, width * batch), kw * n_in, height, down)


def _take(unfolded: _Unfolded, columns: np.ndarray, y: np.ndarray | jax.Array):
    """Return kernel columns [...] for output rows [n], as [..., n * w' * batch]."""
    array, step, _, stride = unfolded
    starts = (y * (stride * step)).reshape((1,) * columns.ndim + (-1,))
    index = columns[..., None] + starts
    taken = array.at[index].get(mode="promise_in_bounds")
    return taken.reshape(*columns.shape, -1)


def _gathered(unfolded, weights, blocks, precision):
    y = np.arange(unfolded.height, dtype=np.int32)
    parts = [
        jnp.matmul(weight, _take(unfolded, block.columns, y), precision=precision)
        for weight, block in zip(weights, blocks.blocks, strict=True)
    ]
    return _in_order(parts, blocks)


def _padded(unfolded, weights, blocks, precision):
    y = np.arange(unfolded.height, dtype=np.int32)
    most_rows, most = np.max([weight.shape for weight in weights], axis=0).tolist()
    stacked = jnp.stack(
        [
            jnp.pad(weight, ((0, most_rows - rows), (0, most - n)))
            for weight in weights
            for rows, n in [weight.shape]
        ]
    )
    # A weight that was filled in is zero: any column will do for it.
    columns = np.stack([np.resize(block.columns, most) for block in blocks.blocks])
    out = jnp.matmul(stacked, _take(unfolded, columns, y), precision=precision)
    parts = [part[: len(b.rows)] for part, b in zip(out, blocks.blocks, strict=True)]
    return _in_order(parts, blocks)


def _rows(unfolded, weights, blocks, precision):
    def part(weight, block):
        product = lambda y: jnp.matmul(
            weight, _take(unfolded, block.columns, y), precision=precision
        )
        by_row = lax.map(product, jnp.arange(unfolded.height))
        return by_row.swapaxes(0, 1).reshape(len(block.rows), -1)

    return _in_order(list(map(part, weights, blocks.blocks)), blocks)


_RUN = {"gathered": _gathered, "padded": _padded, "rows": _rows}


def _in_order(parts: list[jax.Array], blocks: Blocks) -> jax.Array:
    """Put what the blocks' rows came to in the order of the outputs, in axis 0."""
    rows = np.concatenate([block.rows for block in blocks.blocks])
    if len(rows) < blocks.n_rows:
        parts = [*parts, jnp.zeros_like(parts[0][:1])]
    order = np.full(blocks.n_rows, len(rows), np.int32)
    order[rows] = np.arange(len(rows))
    return jnp.concatenate(parts)[order]


def _check(where: str, weights: Sequence[jax.Array], blocks: Blocks, form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"{where}(form=...) must be one of {FORMS}, got {form!r}.")
    if not blocks.blocks:
        raise ValueError(f"{where} needs at least one block; without, all is zero.")
    wanted = [(len(block.rows), len(block.columns)) for block in blocks.blocks]
    got = [weight.shape for weight in weights]
    if got != wanted:
        raise ValueError(
            f"{where}(weights) must have the shapes of the blocks, {wanted}, got "
            f"{got}; blocks.split(kernel) makes them."
        )
