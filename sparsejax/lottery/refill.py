"""Refill: an unstructured mask turned into one of whole neurons.

A layer keeps the neurons that are worth most, as many as its active weights would fill,
and those get all of their weights back.
"""

import math
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from sparsejax._trees import check_same_leaves, tree_at
from sparsejax.lottery.scores import CRITERIA, Criterion, from_weights
from sparsejax.masks.coupled import (
    COUPLED,
    Group,
    Member,
    check_members,
    coupled_masks,
)
from sparsejax.masks.layout import Layout, layouts_of, named_leaves
from sparsejax.masks.selection import top_k_mask
from sparsejax.schedules import share

Score = Criterion | jax.Array  # the latter float [neurons]


def refill(
    mask: jax.Array,
    weights: jax.Array,
    *,
    extra: chex.Numeric = 0.0,
    score: Score = "magnitude",
    layout: Layout | None = None,
) -> jax.Array:
    """Keep the best neurons of a layer whole, and none of the others.

    With n neurons and a density d of the mask, ``ceil(d * n)`` are kept, or
    ``floor(d * n + (n - d * n) * extra)`` where that is more. Can be compiled.

    Args:
      mask: bool array, ``True`` where a weight is active.
      weights: float array like ``mask``: trained weights, as a rule.
      extra: fraction of the other neurons that is kept too, in [0, 1], traced or not
        ("refill+"; the authors' is not published, and their numbers suggest 0.2).
      score: what neurons are ranked by, ties to the lowest index. "magnitude": the sum
        of ``|w|`` over active weights, as in the paper. "count": their number, as the
        released code by default. Or float [neurons], such as `feature_norm` and
        `feature_saliency` make; a neuron whose score is NaN is never kept.
      layout: which axes are neurons, by default the last; each layer of a stack is
        refilled by itself.

    Returns:
      Bool array like ``mask``, all True or all False in each neuron.

    Raises:
      ValueError: unknown or unfit scores, shapes that differ, or ``extra`` outside of
        [0, 1].

    References:
      Chen et al. 2022, "Coarsening the granularity: towards structurally sparse lottery
      tickets", section 3.2 and algorithm 2.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import lottery
      >>> mask = jnp.array([[True, False, False], [True, True, False]])  # [in, out]
      >>> weights = jnp.array([[1.0, 9.0, 9.0], [1.0, -3.0, 9.0]])
      >>> lottery.refill(mask, weights).tolist()
      [[True, True, False], [True, True, False]]
      >>> lottery.refill(mask[:, 1:], weights[:, 1:]).tolist()
      [[True, False], [True, False]]
    """
    _check_extra("refill", extra)
    layout = layout or Layout()
    worth = _neuron_scores("refill", score, mask, weights, layout)
    return _refill(mask, worth, extra, layout)


def refill_tree(
    masks: Any,
    params: Any,
    *,
    extra: chex.Numeric = 0.0,
    score: Criterion | Mapping[str, jax.Array] = "magnitude",
    groups: Any = (),
    layout: Mapping[str, Layout] | None = None,
) -> Any:
    """Refill each mask of a tree; with groups, so that what is not kept can be removed.

    Without ``groups`` each layer is refilled by itself, as in the paper. The rest of
    the network still sees its other channels: their biases and the shifts of their
    norms are left.

    With ``groups`` the layers of a group, as those that add up in a residual stream,
    keep the same channels: as many as their density together would fill, ranked by the
    sum of their scores. A channel that is not kept is masked in all that it takes part
    in, its biases, its norms and the inputs of the layers that read it, so that
    `sparsejax.compaction` removes exactly these channels and the function stays what it
    is. Layers of a group that has a pinned channel, or a layer without a mask, are
    refilled by themselves, and nothing of it is removed.

    Args:
      masks: tree of bool arrays, and None where a leaf is dense.
      params: tree of the same leaves: trained weights.
      extra: as in `refill`.
      score: "magnitude" or "count"; or scores for each mask, float [neurons] by path.
      groups: what `sparsejax.compaction.channel_groups` returns, or its groups.
      layout: dict from path regex to `sparsejax.masks.Layout`.

    Returns:
      Tree of masks like ``params``. With ``groups``, leaves that were dense have one
      too where they belong to channels of a group that is refilled together.

    Raises:
      ValueError: as `refill`; masks or groups of another model; scores that are
        missing.

    References:
      As `refill`. In the paper norms keep their shifts, and its timings take channels
      out all the same; masking them is this library's.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import compaction, lottery
      >>> params = {"a": jnp.array([[1.0, 2.0, 3.0, 4.0]]), "b": jnp.ones((4, 1))}
      >>> f = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
      >>> groups = compaction.channel_groups(f, jnp.ones((1, 1)), params=params)
      >>> masks = {"a": jnp.array([[False, False, True, True]]), "b": None}
      >>> masks = lottery.refill_tree(masks, params, groups=groups)
      >>> masks["a"].tolist(), masks["b"].ravel().tolist()
      ([[False, False, True, True]], [False, False, True, True])
    """
    check_same_leaves("refill_tree(masks)", params, masks)
    _check_extra("refill_tree", extra)
    own, leaves = named_leaves(masks), named_leaves(params)
    layouts = layouts_of(params, layout)
    scores: Mapping[str, Any] = (
        dict.fromkeys(own, score) if isinstance(score, str) else score
    )
    _check_scores(scores, own)
    groups = getattr(groups, "groups", groups)
    check_members("refill_tree(groups=...)", groups, leaves)

    worth = {
        path: _neuron_scores(path, scores[path], mask, leaves[path], layouts[path])
        for path, mask in own.items()
    }
    together = [group for group in groups if _is_refillable(group, own, layouts)]
    live = {group.name: _live_channels(group, own, worth, extra) for group in together}
    by_group = {member.path for group in together for member in _producers(group)}
    new = {
        path: jnp.ones_like(mask)
        if path in by_group
        else _refill(mask, worth[path], extra, layouts[path])
        for path, mask in own.items()
    }
    for path, mask in coupled_masks(together, live, leaves, COUPLED).items():
        new[path] = new[path] & mask if path in new else mask
    return tree_at(params, new)


def _refill(
    mask: jax.Array, worth: jax.Array, extra: chex.Numeric, layout: Layout
) -> jax.Array:
    """Refill a leaf by scores that have axes of size 1 for its inputs."""
    layer = layout.layer_axes(mask.ndim)
    neurons = math.prod(mask.shape[i] for i in layout.resolve(mask.ndim).outputs)
    active = jnp.sum(mask, axis=layer, dtype=jnp.int32)
    kept = _kept(active, mask.size // max(active.size, 1), neurons, extra)
    return jnp.zeros_like(mask) | top_k_mask(worth, kept, axis=layer)


def _live_channels(
    group: Group,
    masks: Mapping[str, jax.Array],
    worth: Mapping[str, jax.Array],
    extra: chex.Numeric,
) -> jax.Array:
    """Return which channels of a group are kept, bool [channels]."""
    total, active, size = jnp.zeros(group.size, jnp.float32), jnp.int32(0), 0
    for member in _producers(group):
        mask = masks[member.path]
        total = total.at[member.channels].add(worth[member.path].reshape(-1))
        active, size = active + jnp.sum(mask, dtype=jnp.int32), size + mask.size
    return top_k_mask(total, _kept(active, size, group.size, extra))


def _producers(group: Group) -> list[Member]:
    return [member for member in group.members if member.role == "producer"]


def _kept(active: jax.Array, size: int, neurons: int, extra: chex.Numeric) -> jax.Array:
    """Return how many neurons are kept, in exact integers.

    Args:
      active: int32, active weights of a layer.
      size: how many weights it has.
      neurons: how many neurons.
      extra: fraction of the others that is kept too.
    """
    fan_in = max(size // max(neurons, 1), 1)
    more = (active + share(size - active, extra)) // fan_in
    return jnp.maximum((active + fan_in - 1) // fan_in, more)


def _neuron_scores(
    what: str, score: Score, mask: jax.Array, weights: jax.Array, layout: Layout
) -> jax.Array:
    """Return float32 scores, with axes of size 1 for the inputs."""
    if mask.shape != weights.shape:
        raise ValueError(
            f"{what}: mask and weights must have one shape, got {mask.shape} and "
            f"{weights.shape}."
        )
    inputs = layout.fan_in_axes(mask.ndim)
    if isinstance(score, str):
        if score not in CRITERIA:
            raise ValueError(
                f"{what}: score= must be one of {CRITERIA} or an array, got {score!r}."
            )
        return from_weights(score, mask, weights, inputs)
    wanted = tuple(n for i, n in enumerate(mask.shape) if i not in inputs)
    if jnp.shape(score) != wanted:
        raise ValueError(
            f"{what}: score= must have one number for each neuron, shape {wanted}, got "
            f"shape {jnp.shape(score)}."
        )
    return jnp.expand_dims(jnp.asarray(score, jnp.float32), inputs)


def _is_refillable(
    group: Any, masks: Mapping[str, jax.Array], layouts: Mapping[str, Layout]
) -> bool:
    """Whether any channel of a group may go, and its producers are masked layers."""

    def is_whole(member: Member) -> bool:
        """Whether all neurons of a layer are channels of the group."""
        if member.path not in masks:
            return False
        own = layouts[member.path].resolve(masks[member.path].ndim)
        alone = own.outputs == (member.axis,) and not own.batch
        return alone and bool((member.channels >= 0).all())

    producers = _producers(group)
    free = bool(producers) and bool(group.removable.all())
    return free and all(map(is_whole, producers))


def _check_extra(what: str, extra: Any) -> None:
    if isinstance(extra, int | float) and not 0 <= extra <= 1:
        raise ValueError(f"{what}(extra=...) must lie in [0, 1], got {extra!r}.")


def _check_scores(scores: Mapping[str, Any], masks: Mapping[str, Any]) -> None:
    for path in masks:
        if path not in scores:
            raise ValueError(
                f"refill_tree(score=...) must have scores for {path}, and has them for "
                f"{', '.join(scores) or 'nothing'}."
            )
