"""The search for thresholds by counting, for all arrays of a tree at once.

The bits of a floating-point number, read through a monotone map to unsigned
integers, order as the number does. The k-th largest score is therefore the largest
integer that at least k scores reach, and it is found by counting: a pass compares
with three thresholds and settles two bits, so at most 17 passes for float32 and 9 for
bfloat16 and float16, fewer when thresholds that separate exactly k scores turn up
early. Ties at a threshold are decided by one more search, over positions.

A slice is what one k belongs to: a whole array, the part of it along some axes, or
all arrays together. The state of a search is one vector over all slices, and nothing
but their counts ever leaves a device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Axes = tuple[int, ...]
Offer = tuple[jax.Array, jax.Array | None, jax.Array | None]


def select(
    candidates: Callable[[jax.Array, list[jax.Array], Any], Sequence[Offer]],
    wanted: Callable[[jax.Array, jax.Array], jax.Array],
    operands: Any,
    like: Sequence[jax.Array],
    axes: Sequence[Axes],
    *,
    rounds: chex.Numeric = 1,
    start: Sequence[jax.Array] | None = None,
    shared: bool = False,
    by_magnitude: bool = False,
) -> list[jax.Array]:
    """Select, round by round, the candidates that score highest.

    The rounds are one loop, and so is breaking ties: however many there are, each
    array is compiled for once, and arrays of one shape share what is compiled.

    Args:
      candidates: ``(round, selected, operands) -> [offer]``, for each array what
        `keys_of` takes; it must not offer what is selected already.
      wanted: ``(round, how many are selected) -> k``, int32 [slices] each.
      operands: arrays that ``candidates`` reads.
      like: arrays whose shapes, shardings and dtypes the scores have.
      axes: for each array, the axes of a slice.
      rounds: how many, traced or not.
      start: bool arrays, what is selected before the first round; None: nothing.
      shared: whether all arrays together are one slice.
      by_magnitude: whether scores are ranked by their absolute value.

    Returns:
      A bool array like each array, ``True`` where it is selected.
    """
    slices = Slices(like, axes, shared=shared)
    key_bounds = slices.constant([key_bound(x.dtype) for x in like])
    number_bound = jnp.uint32(max(slices.last_numbers) + 1)

    def play(state):
        turn, selected, taken, tied_at, missing = state
        round_, breaks_ties = turn >> 1, (turn & 1) == 1
        # Tied to the turn, or XLA computes keys and numbers ahead and keeps them.
        given, one, _ = lax.optimization_barrier((operands, jnp.uint32(1), turn))
        keys = []
        for offer, cut, last, over in zip(
            candidates(round_, selected, given),
            slices.split(tied_at),
            slices.last_numbers,
            slices.axes,
            strict=True,
        ):
            key = keys_of(*offer, by_magnitude=by_magnitude)
            number = jnp.uint32(last) - row_major_index(key, one, over)
            tied = jnp.where(key == cut, number, 0)
            keys.append(jnp.where(breaks_ties, tied, key))

        k = jnp.where(breaks_ties, missing, wanted(round_, taken))
        bound = jnp.where(breaks_ties, number_bound, key_bounds)
        found = search(slices.counter(keys), k, bound)
        separated = found.reached == k
        cuts = slices.split(jnp.where(separated, found.threshold, found.threshold + 1))
        selected = [
            before | (key >= cut)
            for before, key, cut in zip(selected, keys, cuts, strict=True)
        ]
        gained = jnp.where(separated, k, found.above)
        missing = jnp.where(found.threshold > 0, k - gained, 0)
        turn = jnp.where(jnp.any(missing > 0), turn + 1, (round_ + 1) * 2)
        return turn, selected, taken + gained, found.threshold, missing

    zero = zero_of(like)
    none = jnp.broadcast_to(zero, slices.count)
    if start is None:
        start = [jnp.zeros_like(x, dtype=bool) for x in like]
    start = [x | (zero > 0) for x in start]
    state = (zero, start, none, none.astype(jnp.uint32), none)
    return lax.while_loop(lambda state: state[0] < 2 * rounds, play, state)[1]


class Found(NamedTuple):
    """Where a search stands; every field is [slices]."""

    threshold: jax.Array  # uint32, reached by at least k; 0: no key so far
    high: jax.Array  # uint32, above the threshold, reached by fewer than k
    reached: jax.Array  # int32, how many reach the threshold; -1 while it is 0
    above: jax.Array  # int32, how many reach high


def search(count, k: jax.Array, bound: jax.Array, *, exact: bool = False) -> Found:
    """Find thresholds in [0, bound] that at least ``k`` keys reach.

    A slice is done as soon as exactly ``k`` of its keys reach the threshold; with
    ``exact``, and where ties decide, when it is the largest such threshold and
    ``high`` the next integer. Where fewer than ``k`` keys reach 1 it stays at 0.

    Args:
      count: ``[thresholds] -> [counts]`` of keys that reach them, [slices] each.
      k: int32 [slices].
      bound: uint32 [slices], what no key reaches: the answer where ``k`` is 0.
      exact: whether to go on to the last bit.
    """

    def is_open(found):
        wide = found.high - found.threshold > 1
        return wide if exact else wide & (found.reached != k)

    def narrow(found):
        low, high, reached, above = found
        quarter, rest = (high - low) >> 2, (high - low) & 3
        tries = [low + quarter * j + (rest * j >> 2) for j in (1, 2, 3)]
        counts = count(tries)
        for t, n in zip(tries, counts, strict=True):
            enough = is_open(found) & (n >= k) & (t > found.threshold)
            low, reached = jnp.where(enough, t, low), jnp.where(enough, n, reached)
        for t, n in zip(tries[::-1], counts[::-1], strict=True):
            short = is_open(found) & (n < k) & (t > found.threshold)
            high, above = jnp.where(short, t, high), jnp.where(short, n, above)
        return Found(low, high, reached, above)

    zero = jnp.zeros_like(k)
    low = zero.astype(jnp.uint32)
    start = Found(low, low + bound + 1, zero - 1, zero)
    return lax.while_loop(lambda found: jnp.any(is_open(found)), narrow, start)


class Slices:
    """The slices of several arrays, numbered through.

    Args:
      like: the arrays.
      axes: for each, the axes of a slice.
      shared: whether all arrays together are one slice.

    Attributes:
      count: how many slices there are.
      last_numbers: for each array the number of its first element, where elements are
        numbered downwards, to 1, and uniquely within a slice.
    """

    def __init__(
        self, like: Sequence[jax.Array], axes: Sequence[Axes], *, shared: bool
    ):
        self.axes = axes
        self.shared = shared
        self.shapes = [
            tuple(1 if i in over else n for i, n in enumerate(x.shape))
            for x, over in zip(like, axes, strict=True)
        ]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.count = 1 if shared else sum(self.sizes)
        elements = [
            math.prod(x.shape[i] for i in over)
            for x, over in zip(like, axes, strict=True)
        ]
        self.last_numbers = elements
        starts = np.cumsum([0, *self.sizes[:-1]], dtype=np.int32)
        if shared:
            self.last_numbers = np.cumsum(elements[::-1])[::-1].tolist()
            starts = np.zeros_like(starts)
        # Hidden from XLA, which would build a start into the code for its array:
        # arrays of one shape could not share what is compiled.
        self.starts = lax.optimization_barrier([jnp.int32(start) for start in starts])

    def split(self, vector: jax.Array) -> list[jax.Array]:
        """Return each array's part of [slices], shaped to broadcast against it."""
        parts = zip(self.starts, self.sizes, self.shapes, strict=True)
        return [
            lax.dynamic_slice(vector, (start,), (size,)).reshape(shape)
            for start, size, shape in parts
        ]

    def join(self, parts: Sequence[jax.Array]) -> jax.Array:
        """Return [slices] from each array's counts."""
        parts = [_unsharded(part).reshape(-1) for part in parts]
        return sum(parts[1:], parts[0]) if self.shared else jnp.concatenate(parts)

    def constant(self, per_array: Sequence[int]) -> jax.Array:
        """Return uint32 [slices] with one number an array; the first if shared."""
        if self.shared:
            return jnp.full(1, per_array[0], jnp.uint32)
        return jnp.asarray(np.repeat(np.array(per_array, np.uint32), self.sizes))

    def counter(self, keys: Sequence[jax.Array]):
        """Return a function from thresholds to how many keys reach each, [slices]."""

        def count(thresholds):
            cuts = zip(*(self.split(t) for t in thresholds), strict=True)
            counts = [
                count_reached(key, cut, over)
                for key, cut, over in zip(keys, cuts, self.axes, strict=True)
            ]
            return [self.join(parts) for parts in zip(*counts, strict=True)]

        return count


def count_reached(
    keys: jax.Array, thresholds: Sequence[jax.Array], axes: Axes
) -> list[jax.Array]:
    """Count over ``axes`` the keys that reach each threshold, int32."""
    return count_true([keys >= t for t in thresholds], axes)


def count_true(arrays: Sequence[jax.Array], axes: Axes) -> list[jax.Array]:
    """Count over ``axes`` where each of some bool arrays of one shape is True, int32.

    One reduction with several operands reads what they are made from once. XLA's CPU
    backend runs it several times faster than as many reductions with one, which it
    rewrites into windows over a materialised copy.
    """
    last = arrays[0].ndim - 1
    down_columns = axes and axes[-1] < last and axes[-1] - axes[0] < len(axes)
    if down_columns and jax.typeof(arrays[0]).sharding.mesh.empty:
        return _count_columns(arrays, axes)
    return _sums([x.astype(jnp.int32) for x in arrays], axes)


def _count_columns(arrays: Sequence[jax.Array], axes: Axes) -> list[jax.Array]:
    """Count over adjacent axes that are not the last, and not split over a mesh.

    XLA's CPU backend walks down one column after the other, past the caches. So the
    rows are cut into up to 16 blocks, and these are added up: a sum of so few is
    unrolled and runs along the rows, 30 times faster. The counts of the first such
    step have 5 bits, and one number holds them all.
    """
    shape, axis = arrays[0].shape, axes[0]
    lead, tail = shape[:axis], shape[axes[-1] + 1 :]
    rows = math.prod(shape[i] for i in axes)

    def add_blocks(counts, blocks):
        cut = [x.reshape(*lead, blocks, rows // blocks, *tail) for x in counts]
        return lax.optimization_barrier(_sums(cut, (axis,)))

    blocks = _divisor(rows, at_most=16)
    shifts = [5 * i for i in range(len(arrays))]
    packed = sum(x.astype(jnp.uint32) << i for x, i in zip(arrays, shifts, strict=True))
    (packed,) = add_blocks([packed], blocks)
    counts = [(packed >> i & 31).astype(jnp.int32) for i in shifts]
    rows //= blocks
    while rows > 1:
        blocks = _divisor(rows, at_most=16)
        blocks = rows if blocks == 1 else blocks
        counts = add_blocks(counts, blocks)
        rows //= blocks
    return [x.reshape(*lead, *tail) for x in counts]


def _divisor(n: int, *, at_most: int) -> int:
    return max(i for i in range(1, at_most + 1) if n % i == 0)


def _sums(counts: Sequence[jax.Array], axes: Axes) -> list[jax.Array]:
    """Add up several arrays along ``axes`` in one reduction."""
    zeros = [jnp.zeros((), x.dtype) for x in counts]
    add = lambda a, b: [x + y for x, y in zip(a, b, strict=True)]
    return lax.reduce(counts, zeros, add, axes)


def row_major_index(
    like: jax.Array, one: jax.Array, axes: Axes | None = None
) -> jax.Array:
    """Number the elements of each slice along ``axes``, uint32 and from 0.

    A sum of iotas, one an axis, sharded as ``like``: each device makes its own part.
    ``one`` is 1; a caller in a loop ties it to the loop.
    """
    index = jnp.zeros_like(like, jnp.uint32)
    stride = 1
    for axis in reversed(range(like.ndim) if axes is None else axes):
        numbers = lax.broadcasted_iota(jnp.uint32, like.shape, axis)
        index += one * np.uint32(stride % 2**32) * numbers
        stride *= like.shape[axis]
    return index


def keys_of(
    scores: jax.Array,
    where: jax.Array | None,
    nan_is_zero: jax.Array | None,
    *,
    by_magnitude: bool = False,
) -> jax.Array:
    """Map floats to uint32 that order alike; 0 marks what is not eligible.

    Integer operations only: the float units of some backends flush denormals.

    Args:
      scores: float array.
      where: what is eligible; None: all.
      nan_is_zero: where a NaN counts as 0; elsewhere, and if None, it is not eligible.
      by_magnitude: whether to order by absolute value.
    """
    sign, infinity = _sign_and_infinity(scores.dtype)
    bits = lax.bitcast_convert_type(scores, sign.dtype)
    magnitude = bits & ~sign
    eligible = magnitude <= infinity
    if nan_is_zero is not None:
        magnitude = jnp.where(eligible, magnitude, jnp.zeros_like(magnitude))
        eligible |= nan_is_zero
    if where is not None:
        eligible &= where
    keys = sign + magnitude
    if not by_magnitude:
        keys = jnp.where(bits & sign != 0, sign - magnitude, keys)
    return jnp.where(eligible, keys, jnp.zeros_like(keys)).astype(jnp.uint32)


def scores_of(keys: jax.Array, dtype) -> jax.Array:
    """Invert `keys_of`; 0 and `key_bound` become NaN."""
    sign, _ = _sign_and_infinity(dtype)
    named = (keys > 0) & (keys < jnp.uint32(key_bound(dtype)))
    keys = keys.astype(sign.dtype)
    bits = jnp.where(keys >= sign, keys - sign, (sign - keys) | sign)
    scores = lax.bitcast_convert_type(bits, dtype)
    return jnp.where(named, scores, jnp.array(jnp.nan, dtype))


def key_bound(dtype) -> int:
    """Return the key above that of +inf."""
    return sum(map(int, _sign_and_infinity(dtype))) + 1


def _sign_and_infinity(dtype):
    """Return the bit patterns of -0 and of +inf as NumPy unsigned integers."""
    info = jnp.finfo(dtype)
    unsigned = {16: np.uint16, 32: np.uint32}[info.bits]
    infinity = ((1 << info.nexp) - 1) << info.nmant
    return unsigned(1 << (info.bits - 1)), unsigned(infinity)


def _unsharded(counts: jax.Array) -> jax.Array:
    """Spell out, where axes of the mesh are explicit, that counts go everywhere."""
    sharding = jax.typeof(counts).sharding
    if sharding.mesh.explicit_axes and any(sharding.spec):
        everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.P())
        return jax.sharding.reshard(counts, everywhere)
    return counts


def zero_of(arrays: Sequence[jax.Array]) -> jax.Array:
    """Return an int32 0 that, inside `jax.shard_map`, varies as the arrays do.

    A loop's carry must enter it with the type that it comes back with.
    """
    empty = [jnp.atleast_1d(x)[:0] != 0 for x in arrays]
    return sum((jnp.sum(x, dtype=jnp.int32) for x in empty), jnp.int32(0))
