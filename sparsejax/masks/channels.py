"""Channels: what each is worth, which go, and where their weights go to (Chase).

What goes with a channel in other parameters, `sparsejax.masks.coupled` tells.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.masks._search import _unsharded, select
from sparsejax.masks.blend import masked
from sparsejax.masks.coupled import Group
from sparsejax.masks.layout import Layout
from sparsejax.masks.selection import checked_axes, checked_k
from sparsejax.masks.unstructured import Axis

Criterion = Literal["umm", "wmm", "channel_density", "kernel_density"]
CRITERIA = ("umm", "wmm", "channel_density", "kernel_density")


def scores(
    group: Group,
    weights: Mapping[str, jax.Array],
    masks: Mapping[str, jax.Array],
    *,
    criterion: Criterion = "umm",
    layouts: Mapping[str, Layout] | None = None,
) -> jax.Array:
    """Score the channels of a group by the weights that produce them.

    A channel's slice are all weights of a layer that its output sums over, those that
    are masked and those whose input channel was removed included: what training
    starves scores low. The score of a group that several layers produce, as in a
    residual stream, is the mean over the layers.

    Args:
      group: the group; its members of role "producer" count.
      weights: float arrays by path.
      masks: bool arrays by path, ``True`` where a weight is active.
      criterion: "umm", unmasked mean magnitude: the mean of ``|w|`` over the slice,
        with 0 for what is masked. "wmm", weighted mean magnitude: over the active
        weights alone. "channel_density": the fraction of the slice that is active.
        "kernel_density": the fraction of its kernels (one an input channel) that have
        an active weight. A channel without active weights scores 0 by each.
      layouts: by path, which axes are spatial; the default `Layout` elsewhere.

    Returns:
      float32 [channels].

    Raises:
      ValueError: unknown criterion.

    References:
      Yin et al. 2023, "Dynamic sparsity is channel-level sparsity learner", section
      3.2, and the ablations of its released code.

    Example:
      >>> import numpy as np, jax.numpy as jnp
      >>> from types import SimpleNamespace as Data
      >>> from sparsejax.masks import channels
      >>> member = Data(path="w", axis=1, role="producer", channels=np.arange(2))
      >>> group = Data(size=2, members=[member])
      >>> w = jnp.array([[3.0, 1.0], [5.0, -2.0]])
      >>> mask = jnp.array([[False, True], [True, True]])
      >>> channels.scores(group, {"w": w}, {"w": mask}).tolist()
      [2.5, 1.5]
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {CRITERIA}, got {criterion!r}.")
    producers = [member for member in group.members if member.role == "producer"]
    total = jnp.zeros(group.size, jnp.float32)
    for member in producers:
        path = member.path
        layout = (layouts or {}).get(path, Layout())
        parts = _parts(weights[path], masks[path], member.axis, layout, criterion)
        amount, size = (
            _by_channel(part, member.channels, group.size) for part in parts
        )
        total += jnp.where(size > 0, amount / jnp.maximum(size, 1), 0.0)
    return total / len(producers)


def remove(
    scores: Sequence[jax.Array],
    live: Sequence[jax.Array],
    keep: chex.Numeric,
    floors: chex.Numeric,
) -> list[jax.Array]:
    """Remove the channels of lowest score until ``keep`` are left.

    Groups compete, but none falls below its floor: with r the rank of a live channel
    within its group, it may go where ``r < live - floor``, and of those the lowest go.
    That is the greedy choice, in closed form. Equal scores go by group and index, the
    first of them first; a NaN is the highest.

    Args:
      scores: float32 [channels], for each group.
      live: bool [channels], for each group; nothing that is not live returns.
      keep: how many channels stay live, an integer, traced or not: a scalar for all
        groups together, or one each [groups], where they do not compete. More stay
        where floors demand it, fewer where there are fewer.
      floors: int32 [groups], the least that stays of each.

    Returns:
      The new ``live``.

    References:
      Yin et al. 2023, "Dynamic sparsity is channel-level sparsity learner", section
      3.3; its code finds the same by iterating over thresholds.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax.masks import channels
      >>> scores = [jnp.array([0.1, 0.2, 0.3]), jnp.array([0.4, 0.5])]
      >>> live = [jnp.ones(3, bool), jnp.ones(2, bool)]
      >>> left = channels.remove(scores, live, 2, jnp.array([2, 0]))
      >>> [one.tolist() for one in left]
      [[False, True, True], [False, False]]
    """
    sizes = [one.size for one in live]
    starts = np.cumsum([0, *sizes])
    group = np.repeat(np.arange(len(sizes)), sizes)
    score, alive = jnp.concatenate(scores), jnp.concatenate(live)
    counts = jnp.stack([jnp.sum(one, dtype=jnp.int32) for one in live])

    within = _ranks(score, ~alive, group) - starts[group]
    eligible = alive & (within < (counts - floors)[group])
    if jnp.ndim(keep):
        gone = eligible & (within < (counts - keep)[group])
    else:
        gone = eligible & (_ranks(score, ~eligible) < jnp.sum(counts) - keep)
    return jnp.split(alive & ~gone, starts[1:-1])


def drop_and_grow_together(
    masks: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    gradients: Sequence[jax.Array],
    *,
    keep: chex.Numeric | Sequence[chex.Numeric],
    total: chex.Numeric | Sequence[chex.Numeric],
    axes: Sequence[Axis] | None = None,
) -> list[jax.Array]:
    """Drop the active weights of least magnitude of all arrays, grow among all.

    The active weights of largest magnitude stay; then weights that are not kept grow
    where the gradient is largest, up to ``total``. Those just dropped take part, and
    one that wins has in effect not been dropped. A gradient of 0 or NaN never grows,
    so that what must stay masked is told by a gradient of 0. A NaN weight counts as 0.

    Args:
      masks: bool arrays, ``True`` where a weight is active.
      weights: float arrays like the masks.
      gradients: float arrays like the masks; ranked by magnitude.
      keep: how many active weights stay, an integer, traced or not; all where fewer
        are active.
      total: how many are active afterwards, if as many can grow.
      axes: None lets all arrays compete. A list of the axes of a slice of each array
        (None: the whole) lets each slice keep to itself; ``keep`` and ``total`` are
        then lists, too, of scalars or one value per slice.

    Returns:
      The new masks.

    Raises:
      TypeError, ValueError: as `sparsejax.masks.top_k_mask`.

    References:
      Yin et al. 2023, "Dynamic sparsity is channel-level sparsity learner", section
      3.1.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax.masks import channels
      >>> masks = [jnp.array([True, True]), jnp.array([True, False, False])]
      >>> weights = [jnp.array([3.0, 0.1]), jnp.array([2.0, 0.0, 0.0])]
      >>> gradients = [jnp.array([0.0, 0.5]), jnp.array([0.0, 4.0, 0.0])]
      >>> new = channels.drop_and_grow_together(
      ...     masks, weights, gradients, keep=2, total=3)
      >>> [one.tolist() for one in new]
      [[True, False], [True, True, False]]
    """
    shared = axes is None
    dtype = jnp.result_type(*weights, *gradients)
    weights = [weight.astype(dtype) for weight in weights]
    gradients = [gradient.astype(dtype) for gradient in gradients]
    over = checked_axes(weights, masks, axes, together=shared)
    if shared:
        count = lambda k: checked_k([k], [jnp.zeros(())], [()])
        most = count(sum(mask.size for mask in masks))
    else:
        count = lambda k: checked_k(k, weights, over)
        most = count([_slice_size(w, o) for w, o in zip(weights, over, strict=True)])
    keep, total = jnp.minimum(count(keep), most), count(total)

    def candidates(round_, kept, operands):
        """Offer active weights to keep, then what is not kept to grow."""
        keeping = round_ == 0
        offers = []
        for (mask, weight, gradient), taken in zip(operands, kept, strict=True):
            score = jnp.where(keeping, weight, gradient)
            may = jnp.where(keeping, mask, ~taken & (gradient != 0))
            offers.append((score, may, mask & keeping))
        return offers

    def wanted(round_, kept):
        return jnp.where(round_ == 0, keep, jnp.maximum(total - kept, 0))

    operands = list(zip(masks, weights, gradients, strict=True))
    return select(
        candidates,
        wanted,
        operands,
        weights,
        over,
        rounds=2,
        shared=shared,
        by_magnitude=True,
    )


def _parts(
    weight: jax.Array, mask: jax.Array, axis: int, layout: Layout, criterion: str
) -> tuple[jax.Array, jax.Array]:
    """Return what a criterion divides by what, float32 [size of the axis] each."""
    own = layout.resolve(weight.ndim)
    spatial = set(range(weight.ndim)) - {*own.outputs, *own.inputs, *own.batch, axis}
    if criterion == "kernel_density":
        mask = jnp.any(mask, axis=tuple(spatial), keepdims=True)
    over = tuple(i for i in range(weight.ndim) if i != axis)
    add = lambda x: _unsharded(jnp.sum(x, axis=over, dtype=jnp.float32))
    active = add(mask)
    size = jnp.full_like(active, mask.size // mask.shape[axis])
    if criterion in ("channel_density", "kernel_density"):
        return active, size
    amount = add(jnp.abs(masked(mask, weight)).astype(jnp.float32))
    return amount, size if criterion == "umm" else active


def _slice_size(x: jax.Array, axes: tuple[int, ...]) -> int:
    return math.prod(x.shape[axis] for axis in axes)


def _by_channel(x: jax.Array, channels: np.ndarray, size: int) -> jax.Array:
    """Add up [size of an axis] by channel; most axes have one index a channel."""
    if np.array_equal(channels, np.arange(size)):
        return x
    own = np.flatnonzero(channels >= 0)
    return jax.ops.segment_sum(x[own], channels[own], size)


def _ranks(*keys: jax.Array | np.ndarray) -> jax.Array:
    """Rank by the last key, then the one before it, ties by index."""
    return jnp.argsort(jnp.lexsort(keys))
