"""Random masks with as many active weights in every row, without random arrays.

As in `sparsejax.masks._random`, the score of a position is a mix of its index and two
random words, the threshold of a row is found from these alone, and the mask is one
comparison: no device ever holds more than its part of it.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax.masks._random import _mix
from sparsejax.masks._search import count_reached, row_major_index, search


def random_row_mask(
    words: jax.Array, weight: jax.Array, k: jax.Array, axes: tuple[int, ...]
) -> jax.Array:
    """Draw ``k`` positions of every row.

    Args:
      words: uint32 [2], random.
      weight: array whose shape and sharding the mask takes.
      k: how many to draw, int32, of 1 or more, one for each row, in the shape that a
        reduction of ``weight`` over ``axes`` has with its dimensions kept.
      axes: the axes of a row.

    Returns:
      Bool array.
    """
    size = math.prod(weight.shape[i] for i in axes)
    others = tuple(i for i in range(weight.ndim) if i not in axes)
    cuts = _cuts(words, k.reshape(-1), size).reshape(k.shape)
    one = jnp.uint32(1)
    row = row_major_index(weight, one, others)
    return _order(words, row, row_major_index(weight, one, axes), size) >= cuts


def _cuts(words: jax.Array, k: jax.Array, size: int) -> jax.Array:
    """Return the least score that is drawn in each row, uint32 [rows]."""

    def count(tries):
        # Tied to the tries, or XLA would make all scores ahead and keep them.
        tries, row = lax.optimization_barrier((tries, jnp.arange(k.size)))
        position = lax.broadcasted_iota(jnp.uint32, (k.size, size), 1)
        keys = _order(words, row.astype(jnp.uint32)[:, None], position, size)
        return count_reached(keys, [t[:, None] for t in tries], (1,))

    bound = jnp.full(k.shape, 2**32 - 2, jnp.uint32)
    return search(count, k, bound).threshold


def _order(words, row, position, size) -> jax.Array:
    """Return 32 bits in random order, that no two positions share."""
    index = row * np.uint32(size % 2**32) + position
    return _mix(_mix(index ^ words[0]) + words[1])
