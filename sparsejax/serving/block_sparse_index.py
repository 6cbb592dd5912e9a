"""Where the dense blocks of a kernel stand."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Block(NamedTuple):
    """A block: all weights in some rows and some columns of a kernel's matrix."""

    rows: np.ndarray  # int32, ascending
    columns: np.ndarray  # int32, ascending


class Blocks:
    """The dense blocks that make up a kernel; everything outside of them is zero.

    A kernel ``[kh, kw, in, out]`` or ``[in, out]`` is seen as a matrix of a row for
    each output, ``kernel.reshape(-1, out).T``: column ``(r * kw + s) * in + c`` is the
    tap (r, s) of the input channel c. Different blocks have different rows and may
    share columns.

    Blocks with the same columns are joined, and those without rows or columns left
    out. The object does not change, and equals one of the same shape and blocks, so
    that it may be a static argument of `jax.jit`.

    Attributes:
      shape: of the kernel.
      blocks: tuple of `Block`, in the order of their first row.

    Args:
      shape: of the kernel, of two or four axes.
      pairs: of each block its rows and its columns, integers in any order, as
        `sparsejax.lottery.regroup` returns them.

    Raises:
      ValueError: an index is not in the kernel or is there twice, or two blocks have a
        row in common.
      TypeError: rows or columns are not integers.

    Example:
      >>> import numpy as np
      >>> from sparsejax import serving
      >>> pairs = [([0, 1], [2, 5, 8]), ([3], [0]), ([2], [8, 5, 2])]
      >>> blocks = serving.Blocks((3, 3, 1, 4), pairs)
      >>> blocks
      Blocks((3, 3, 1, 4), 3x3 1x1)
      >>> kernel = np.arange(36.0).reshape(3, 3, 1, 4)
      >>> [weight.shape for weight in blocks.split(kernel)]
      [(3, 3), (1, 1)]
      >>> round(blocks.density, 3)
      0.278
    """

    shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    def __init__(self, shape: Sequence[int], pairs: Iterable[tuple[Any, Any]]):
        self.shape = tuple(shape)
        if len(self.shape) not in (2, 4):
            raise ValueError(
                "Blocks(shape) must be that of a kernel [kh, kw, in, out] or "
                f"[in, out], got {self.shape}."
            )
        rows_of: dict[bytes, list[np.ndarray]] = {}
        seen = np.zeros(self.n_rows, bool)
        for number, (rows, columns) in enumerate(pairs):
            where = f"Blocks: block {number}"
            rows = _indices(f"{where} has rows that", rows, self.n_rows)
            columns = _indices(f"{where} has columns that", columns, self.n_columns)
            if seen[rows].any():
                raise ValueError(
                    f"{where} must have rows of its own, got "
                    f"{rows[seen[rows]].tolist()}, which an earlier block has; give "
                    "each row to one block."
                )
            seen[rows] = True
            if len(rows) and len(columns):
                rows_of.setdefault(columns.tobytes(), []).append(rows)
        blocks = [
            Block(np.sort(np.concatenate(rows)), np.frombuffer(columns, np.int32))
            for columns, rows in rows_of.items()
        ]
        for block in blocks:
            block.rows.flags.writeable = False
        self.blocks = tuple(sorted(blocks, key=lambda block: block.rows[0]))

    @classmethod
    def full(cls, shape: Sequence[int]) -> "Blocks":
        """Return one block of all weights of a kernel."""
        return cls(shape, [(np.arange(shape[-1]), np.arange(math.prod(shape[:-1])))])

    @property
    def n_rows(self) -> int:
        """The number of rows of the kernel's matrix, its outputs."""
        return self.shape[-1]

    @property
    def n_columns(self) -> int:
        """The number of columns of the kernel's matrix."""
        return math.prod(self.shape[:-1])

    @property
    def density(self) -> float:
        """The part of the kernel's weights, and of its multiply-adds, in blocks."""
        inside = sum(len(block.rows) * len(block.columns) for block in self.blocks)
        return inside / math.prod(self.shape)

    @property
    def mask(self) -> np.ndarray:
        """Bool array like the kernel, True inside of blocks."""
        mask = np.zeros((self.n_columns, self.n_rows), bool)
        for block in self.blocks:
            mask[np.ix_(block.columns, block.rows)] = True
        return mask.reshape(self.shape)

    def split(self, kernel: jax.Array | np.ndarray) -> tuple[jax.Array, ...]:
        """Return the weights of each block, [rows, columns]; what is outside is lost.

        Raises:
          ValueError: the kernel has another shape.
        """
        if kernel.shape != self.shape:
            raise ValueError(
                f"Blocks.split(kernel): the blocks are those of a kernel {self.shape}, "
                f"got {kernel.shape}."
            )
        matrix = jnp.asarray(kernel).reshape(self.n_columns, self.n_rows)
        return tuple(matrix[np.ix_(b.columns, b.rows)].T for b in self.blocks)

    def join(self, weights: Sequence[jax.Array]) -> jax.Array:
        """Return the kernel of which the weights are the blocks; inverts `split`."""
        dtype = jnp.result_type(*weights) if weights else jnp.float32
        matrix = jnp.zeros((self.n_columns, self.n_rows), dtype)
        for weight, block in zip(weights, self.blocks, strict=True):
            matrix = matrix.at[np.ix_(block.columns, block.rows)].set(weight.T)
        return matrix.reshape(self.shape)

    def take(self, keep: Sequence[np.ndarray | None]) -> "Blocks":
        """Return the blocks of a kernel that lost channels.

        Args:
          keep: for each axis of the kernel the indices that are left, ascending, or
            None for all, as `sparsejax.compaction.Plan` has them.
        """
        kept = [
            np.arange(n) if one is None else np.asarray(one)
            for n, one in zip(self.shape, keep, strict=True)
        ]
        *inner, outer = kept
        columns = np.ravel_multi_index(np.ix_(*inner), self.shape[:-1]).ravel()
        pairs = [
            (_positions(block.rows, outer), _positions(block.columns, columns))
            for block in self.blocks
        ]
        return Blocks([len(one) for one in kept], pairs)

    @property
    def _key(self) -> tuple[Any, ...]:
        return self.shape, *((r.tobytes(), c.tobytes()) for r, c in self.blocks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blocks) and self._key == other._key

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        sizes = " ".join(f"{len(r)}x{len(c)}" for r, c in self.blocks)
        return f"Blocks({self.shape}, {sizes})"


def _indices(what: str, given: Any, size: int) -> np.ndarray:
    """Return indices ascending, int32; raise unless they are different and in range."""
    given = np.asarray(given)
    if given.size and not np.issubdtype(given.dtype, np.integer):
        raise TypeError(f"{what} must be integers, got {given.dtype}.")
    index, counts = np.unique(given, return_counts=True)
    if (counts > 1).any() or (index < 0).any() or (index >= size).any():
        wrong = index[(counts > 1) | (index < 0) | (index >= size)][:5].tolist()
        raise ValueError(
            f"{what} must be different and lie in [0, {size}), got {wrong} beside or "
            "repeatedly; the kernel's matrix is [out, kh * kw * in]."
        )
    return index.astype(np.int32)


def _positions(index: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return where those of the indices that are kept stand among the kept."""
    return np.flatnonzero(np.isin(kept, index))
