"""What the channels of a network are worth, and which of them training starves."""

from collections.abc import Mapping
from typing import Any

import chex
import numpy as np
import optax

from sparsejax.masks import channels
from sparsejax.masks.layout import Layout, layouts_of, named_leaves


def channel_scores(
    groups: Any,
    params: optax.Params,
    masks: chex.ArrayTree,
    *,
    criterion: channels.Criterion = "umm",
    layout: Mapping[str, Layout] | None = None,
) -> dict[str, np.ndarray]:
    """Score the channels of all groups whose channels can be removed.

    Args:
      groups: what `sparsejax.compaction.channel_groups` returns, or its groups.
      params: the parameters that the groups are of.
      masks: tree like ``params`` of bool arrays, ``True`` where a weight is active,
        and None where a leaf is dense.
      criterion: "umm", the mean magnitude of the weights that a channel is computed
        by, 0 for those that are masked; or another of
        `sparsejax.masks.channels.scores`.
      layout: dict from path regex to `sparsejax.masks.Layout`.

    Returns:
      By name of the group float32 [channels].

    Raises:
      ValueError: unknown criterion; a layout that fits no leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import analysis, compaction
      >>> params = {"a": jnp.array([[3.0, 1.0], [1.0, 0.0]]), "b": jnp.ones((2, 1))}
      >>> masks = {"a": params["a"] > 0, "b": None}
      >>> f = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
      >>> groups = compaction.channel_groups(f, jnp.ones((1, 2)), params=params)
      >>> analysis.channel_scores(groups, params, masks)
      {'a': array([2. , 0.5], dtype=float32)}
    """
    weights, named = named_leaves(params), named_leaves(masks)
    named |= {p: np.ones(w.shape, bool) for p, w in weights.items() if p not in named}
    layouts = layouts_of(params, layout)
    score = lambda group: channels.scores(
        group, weights, named, criterion=criterion, layouts=layouts
    )
    return {
        group.name: np.asarray(score(group))
        for group in getattr(groups, "groups", groups)
        if np.all(group.removable) and _is_produced(group)
    }


def amenable_channels(scores: np.ndarray, *, below: float = 0.5) -> np.ndarray:
    """Find the channels that training has left far behind the others.

    Sparse training moves weights out of some channels by itself. The paper calls these
    sparse amenable channels, and removes them; where this function draws the line is
    a choice made here.

    Args:
      scores: float [channels] of one group, as from `channel_scores`.
      below: the fraction of the group's mean score that such a channel stays below.

    Returns:
      bool [channels].

    References:
      Yin et al. 2023, "Dynamic sparsity is channel-level sparsity learner", section
      3.2.

    Example:
      >>> import numpy as np
      >>> from sparsejax import analysis
      >>> analysis.amenable_channels(np.array([0.0, 0.2, 1.0, 1.2]))
      array([ True,  True, False, False])
    """
    return scores < below * scores.mean()


def _is_produced(group: Any) -> bool:
    return any(member.role == "producer" for member in group.members)
