"""Groups of channels, as plain data: which can shrink, and what is masked with them."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax._trees import tree_at
from sparsejax.masks.coupled import COUPLED, check_members
from sparsejax.masks.layout import named_leaves


def prunable_groups(groups: Any, *, skip: bool) -> list[Any]:
    """Return the groups that channels may be removed from.

    Args:
      groups: a report that has groups, or groups.
      skip: whether groups of several layers, and of layers of two kinds, are among
        them.

    Raises:
      TypeError: these are no groups.
    """
    groups = getattr(groups, "groups", groups)
    try:
        free = [group for group in groups if np.all(group.removable)]
    except (TypeError, AttributeError):
        raise TypeError(
            "chase(groups=...) must be what sparsejax.compaction.channel_groups "
            f"returns, or groups of it, got {type(groups).__name__}."
        ) from None
    return [group for group in free if _is_prunable(group, skip)]


def _is_prunable(group: Any, skip: bool) -> bool:
    producers = [member.axis for member in group.members if member.role == "producer"]
    consumers = [member.axis for member in group.members if member.role == "consumer"]
    if skip:
        return bool(producers)
    if not len(producers) == len(consumers) == 1:
        return False
    # Inputs lie beside outputs in every kernel, so layers of one kind have them so.
    return abs(producers[0] - consumers[0]) == 1


def with_coupled(params: Any, masks: Any, groups: Sequence[Any]) -> Any:
    """Add masks, all True, for the dense leaves that have channels of the groups.

    Raises:
      ValueError: the groups are not those of the parameters.
    """
    leaves, named = named_leaves(params), named_leaves(masks)
    check_members("chase(groups=...)", groups, leaves)
    for group in groups:
        for member in group.members:
            if member.role in COUPLED and member.path not in named:
                named[member.path] = jnp.ones_like(leaves[member.path], dtype=bool)
    return tree_at(params, named)


def channel_floors(
    groups: Sequence[Any], channel_sparsity: float, min_channels: float
) -> tuple[jax.Array, ...]:
    """Return how many channels each group keeps at least, int32 scalars.

    Args:
      groups: the groups.
      channel_sparsity: the fraction of all channels that goes.
      min_channels: the fraction of what is left that each group keeps if all lost
        alike.
    """
    exact = lambda x: Fraction(repr(float(x)))
    least = (1 - exact(channel_sparsity)) * exact(min_channels)
    return tuple(jnp.int32(math.floor(group.size * least)) for group in groups)
