"""Random orders, and the random masks that follow from them, without random arrays.

The score of a position is a bijective mix of its index and two random words. It costs
a fifth of `jax.random.bits`, depends on neither mesh nor backend, and can be computed
anew wherever it is needed. So the threshold of a mask is found from the words and the
size alone, by one small program for all layers, and the mask is one comparison.
"""

import zlib
from collections.abc import Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax.masks._search import count_reached, row_major_index, search

_CHUNK = 2**18  # positions that are hashed and counted at once


def random_words(key: jax.Array, names: Sequence[str]) -> jax.Array:
    """Draw two words for each name, uint32 [names, 2], independent of other names."""
    hashes = np.array([zlib.crc32(name.encode()) for name in names], np.uint32)
    draw = lambda name_hash: jax.random.bits(jax.random.fold_in(key, name_hash), (2,))
    return jax.vmap(draw)(jnp.asarray(hashes))


def random_scores(words: jax.Array, like: jax.Array) -> jax.Array:
    """Draw scores in random order, for selections only.

    The values lie in [0, 2), and all orders are equally likely as far as the mixer
    goes. Their distribution is not uniform: they are random bits seen as a float.

    Args:
      words: uint32 [2], random; see `random_words`.
      like: array whose shape and sharding the scores take.

    Returns:
      float32 array.
    """
    bits = _order(row_major_index(like, jnp.uint32(1)), words[0], words[1])
    return lax.bitcast_convert_type(bits, jnp.float32)


def random_masks(
    key: jax.Array,
    weights: Mapping[str, jax.Array],
    k: Sequence[chex.Numeric],
    axes: Sequence[tuple[int, ...] | None],
) -> list[jax.Array]:
    """Draw masks with exactly ``k`` active weights, each uniform among all of them.

    A layer draws from the key by its name alone: ``"fc/kernel"``, or ``"fc/kernel[0]"``
    in a stack. Within a layer the mask is the top k of `random_scores`.

    Args:
      key: a PRNG key.
      weights: arrays by name, whose shapes and shardings the masks take.
      k: for each, how many are active, a scalar or one value a stacked layer.
      axes: for each, the axes of one layer where it stacks several; None: all.

    Returns:
      List of bool arrays.
    """
    leaves = []
    for (name, weight), own_k, over in zip(weights.items(), k, axes, strict=True):
        over = tuple(range(weight.ndim)) if over is None else over
        stack = tuple(n for i, n in enumerate(weight.shape) if i not in over)
        shape = tuple(1 if i in over else n for i, n in enumerate(weight.shape))
        names = [f"{name}{list(index)}" for index in np.ndindex(*stack)]
        own_k = jnp.maximum(jnp.asarray(own_k, jnp.int32), 0)
        own_k = jnp.broadcast_to(own_k, stack).reshape(-1)
        leaves.append((weight, over, shape, names if stack else [name], own_k))

    per_leaf = [len(names) for _, _, _, names, _ in leaves]
    words = random_words(key, [name for leaf in leaves for name in leaf[3]])
    sizes = [w.size // n for (w, *_), n in zip(leaves, per_leaf, strict=True)]
    sizes = jnp.asarray(np.repeat(np.array(sizes, np.int32), per_leaf))
    ks = jnp.concatenate([leaf[4] for leaf in leaves])
    cuts = lax.map(lambda layer: _cut(*layer), (words, sizes, ks))
    table = jnp.concatenate([words, *cuts], axis=1)

    # Hidden from XLA, so that leaves of one shape share what is compiled.
    starts = np.cumsum([0, *per_leaf[:-1]], dtype=np.int32)
    starts = lax.optimization_barrier([jnp.int32(start) for start in starts])
    masks = []
    for (weight, over, shape, names, _), start in zip(leaves, starts, strict=True):
        rows = lax.dynamic_slice(table, (start, 0), (len(names), 4))
        first, second, cut, tie = (rows[:, i].reshape(shape) for i in range(4))
        index = row_major_index(weight, jnp.uint32(1), over)
        order = _order(index, first, second) + 1
        number = jnp.uint32(weight.size // len(names)) - index
        masks.append((order > cut) | ((order == cut) & (number >= tie)))
    return masks


def _cut(words: jax.Array, size: jax.Array, k: jax.Array):
    """Return the key that separates the top ``k``, and its first tie; uint32 [1]."""

    def counter(keys_at):
        def count(tries):
            def add_chunk(i, totals):
                index = i * _CHUNK + lax.iota(jnp.int32, _CHUNK)
                keys = jnp.where(index < size, keys_at(index.astype(jnp.uint32)), 0)
                counts = count_reached(keys, tries, (0,))
                return [total + n for total, n in zip(totals, counts, strict=True)]

            chunks = (size + _CHUNK - 1) // _CHUNK
            return lax.fori_loop(0, chunks, add_chunk, [jnp.int32(0)] * len(tries))

        return count

    order = lambda index: _order(index, words[0], words[1]) + 1
    found = search(counter(order), k, jnp.uint32(2**30 + 1))

    def first_tie():
        last = size.astype(jnp.uint32)
        tied = lambda i: jnp.where(order(i) == found.threshold, last - i, 0)
        return search(counter(tied), k - found.above, last + 1).threshold

    separated = found.reached == k
    tie = lax.cond(separated, lambda: jnp.zeros_like(found.threshold), first_tie)
    return found.threshold[None], tie[None]


def _order(index: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """Return 30 bits whose order over the indices is random."""
    return _mix(_mix(index ^ first) + second) >> 2


def _mix(x: jax.Array) -> jax.Array:
    """Permute the 32-bit integers: multiply and xor-shift, as hash finalisers do."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
