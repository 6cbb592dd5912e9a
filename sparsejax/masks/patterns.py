"""Masks with a pattern: N of M neighbours, or whole blocks.

A pattern cuts a weight into tiles of neighbouring inputs and neurons. Every spatial
position of a kernel and every stacked layer is cut by itself. N:M selects within each
tile, and blocks are selected as wholes among all tiles of a layer.
"""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp

from sparsejax.masks._search import keys_of
from sparsejax.masks._tiles import cut
from sparsejax.masks.layout import Layout
from sparsejax.masks.selection import checked_axes, top_k_mask


@dataclasses.dataclass(frozen=True)
class NM:
    """Of every ``m`` neighbouring inputs of a neuron, ``n`` are active.

    Neighbours lie along the last input axis of the layout, from index 0 on: inputs of
    a dense layer, and input channels of a convolution at one position of the kernel,
    as sparse tensor cores multiply them.

    Attributes:
      n: active weights in a group, 1 to ``m``.
      m: weights in a group; divides the length of the axis.

    Raises:
      ValueError: ``n`` or ``m`` is no such integer.

    References:
      Mishra et al. 2021, "Accelerating sparse deep neural networks", for 2:4; Zhou et
      al. 2021, "Learning N:M fine-grained structured sparse neural networks from
      scratch", whose code has input channels last in a group's order, too.

    Example:
      >>> from sparsejax import masks
      >>> masks.NM(2, 4)
      NM(n=2, m=4)
    """

    n: int
    m: int

    def __post_init__(self):
        _check_whole("NM(m=...)", self.m)
        _check_whole("NM(n=...)", self.n)
        if self.n > self.m:
            raise ValueError(f"{self}: n weights of m are active; n must be at most m.")

    @property
    def tile(self) -> dict[str, int]:
        """How many neurons and inputs a tile has, where it is cut at all."""
        return {"inputs": self.m}

    def budget(self, size: int, given: int) -> int:
        """Return what a layer of ``size`` weights keeps, whatever it was given."""
        return size // self.m * self.n

    def counts(self, size: int, budget: Any) -> tuple[int, Any]:
        """Return the size of a slice of the selection, and how many it keeps."""
        return self.m, budget // (size // self.m)


@dataclasses.dataclass(frozen=True)
class Block:
    """Blocks of neighbouring neurons and inputs are active or not as a whole.

    Neighbours lie along the last output and the last input axis of the layout, from
    index 0 on; in a convolution, each position of the kernel has blocks of its own.
    A block is ranked by the sum of the magnitudes of its weights, taken in float32 and
    in one order on every backend and mesh.

    Attributes:
      neurons: length of a block along the output axis, which it divides.
      inputs: length of a block along the input axis, which it divides.

    Raises:
      ValueError: a length is no integer of at least 1.

    Example:
      >>> from sparsejax import masks
      >>> masks.Block(neurons=16, inputs=8)
      Block(neurons=16, inputs=8)
    """

    neurons: int
    inputs: int

    def __post_init__(self):
        _check_whole("Block(neurons=...)", self.neurons)
        _check_whole("Block(inputs=...)", self.inputs)

    @property
    def tile(self) -> dict[str, int]:
        """How many neurons and inputs a tile has, where it is cut at all."""
        lengths = {"neurons": self.neurons, "inputs": self.inputs}
        return {role: length for role, length in lengths.items() if length > 1}

    def budget(self, size: int, given: int) -> int:
        """Return what a layer keeps of a budget: whole blocks, at least one if any."""
        return max(given // self.area, min(given, 1)) * self.area

    def counts(self, size: int, budget: Any) -> tuple[int, Any]:
        """Return the size of a slice of the selection, and how many it keeps."""
        return size // self.area, budget // self.area

    @property
    def area(self) -> int:
        """How many weights a block has."""
        return self.neurons * self.inputs


Pattern = NM | Block


def nm_mask(
    scores: jax.Array, n: chex.Numeric, m: int, *, layout: Layout | None = None
) -> jax.Array:
    """Select the ``n`` largest of every ``m`` neighbouring scores, as `NM` says.

    Every group is ranked by itself, in one pass that compares its scores with each
    other: no device needs to know of another.

    Args:
      scores: float32, bfloat16 or float16 array; for magnitude pruning, magnitudes.
      n: how many of a group, an integer, traced or not, scalar or per stacked layer.
        Less than 0 counts as 0, more than ``m`` as ``m``.
      m: how many scores a group has; divides the last input axis.
      layout: which axes are neurons and inputs; ``None``: those of Flax.

    Returns:
      Bool array of the shape and sharding of ``scores``. Ties go to the lowest index;
      a NaN is never selected, and groups with fewer than ``n`` numbers have fewer.

    Raises:
      TypeError: the scores are not float32, bfloat16 or float16, or ``n`` is not an
        integer.
      ValueError: ``m`` does not divide the axis, or is not an integer of at least 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import masks
      >>> scores = jnp.array([[3.0], [1.0], [2.0], [0.0], [5.0], [5.0], [5.0], [6.0]])
      >>> masks.nm_mask(scores, 2, 4)[:, 0].astype(int).tolist()
      [1, 0, 1, 0, 1, 0, 0, 1]
    """
    scores, n = jnp.asarray(scores), jnp.asarray(n)
    checked_axes([scores], [None])
    if not jnp.issubdtype(n.dtype, jnp.integer):
        raise TypeError(f"nm_mask(n=...) must be an integer, got dtype {n.dtype}.")
    tiles = cut("nm_mask", scores.shape, layout or Layout(), NM(1, m).tile)
    return tiles.largest(keys_of(scores, None, None), n, scores)


def block_mask(
    scores: jax.Array,
    k: chex.Numeric,
    block: Block,
    *,
    layout: Layout | None = None,
) -> jax.Array:
    """Select the ``k`` blocks of a layer with the largest sums of scores.

    Args:
      scores: float32, bfloat16 or float16 array; for magnitude pruning, magnitudes.
      k: how many blocks, an integer, traced or not, scalar or per stacked layer.
      block: their shape, which divides that of the weight.
      layout: which axes are neurons and inputs; ``None``: those of Flax.

    Returns:
      Bool array of the shape and sharding of ``scores``. Ties go to the lowest index
      of a block; one with a NaN is never selected.

    Raises:
      TypeError, ValueError: as `sparsejax.masks.top_k_mask`.
      ValueError: the blocks do not divide the weight.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import masks
      >>> scores = jnp.array([[0.0, 9.0, 4.0, 4.0], [0.0, 0.0, 4.0, 4.0]])
      >>> block = masks.Block(neurons=2, inputs=2)
      >>> masks.block_mask(scores, 1, block).astype(int).tolist()
      [[0, 0, 1, 1], [0, 0, 1, 1]]
    """
    scores = jnp.asarray(scores)
    checked_axes([scores], [None])
    layout = layout or Layout()
    tiles = cut("block_mask", scores.shape, layout, block.tile)
    chosen = top_k_mask(tiles.total(scores), k, axis=layout.layer_axes(scores.ndim))
    return tiles.spread(chosen, scores)


def _check_whole(what: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{what} must be an integer of at least 1, got {value!r}.")
