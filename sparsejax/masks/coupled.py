"""Channels that live and die together: what one mask says about other parameters.

Groups come as plain data, such as `sparsejax.compaction.channel_groups` finds them.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.masks._search import Slices


class Member(Protocol):
    """An axis of a parameter that belongs to a group.

    Attributes:
      path: the parameter's.
      axis: of the parameter.
      role: "producer", "norm", "consumer" or another.
      channels: int [size of the axis], the group's channel of each index, or -1.
    """

    path: str
    axis: int
    role: str
    channels: np.ndarray


class Group(Protocol):
    """Channels that are removed from all members or from none.

    Attributes:
      name: of the group.
      size: how many channels there are.
      members: what belongs to it.
    """

    name: str
    size: int
    members: Sequence[Member]


COUPLED = ("producer", "norm", "consumer")  # the members that go with a channel


def check_members(
    what: str,
    groups: Sequence[Group],
    leaves: Mapping[str, jax.Array],
    roles: Collection[str] = COUPLED,
) -> None:
    """Raise ValueError unless all that goes with a channel is among the parameters.

    Args:
      what: the argument, for the message.
      groups: the groups.
      leaves: the parameters by path.
      roles: of the members that must be there.
    """
    for group in groups:
        for member in group.members:
            if member.role not in roles:
                continue
            path, n = member.path, len(member.channels)
            shape = leaves[path].shape if path in leaves else ()
            if member.axis >= len(shape) or shape[member.axis] != n:
                raise ValueError(
                    f"{what}: the group {group.name} must have {n} indices on axis "
                    f"{member.axis} of {path}, got "
                    f"{f'shape {shape}' if path in leaves else 'no such parameter'}; "
                    "take the groups of this model, and give all of its parameters."
                )


def live_channels(group: Group, masks: Mapping[str, jax.Array]) -> jax.Array:
    """Find the channels into which some producer still writes.

    A channel with several producers, as in a residual stream, is dead when all of its
    neurons in all of them are.

    Args:
      group: the channels.
      masks: bool arrays by path; a producer without one is dense, and all live.

    Returns:
      bool [group.size].

    Example:
      >>> import types
      >>> import jax.numpy as jnp, numpy as np
      >>> from sparsejax import masks
      >>> member = types.SimpleNamespace(
      ...     path="fc/kernel", axis=1, role="producer", channels=np.arange(3))
      >>> group = types.SimpleNamespace(name="fc", size=3, members=(member,))
      >>> mask = jnp.array([[True, False, False], [True, False, True]])
      >>> masks.coupled.live_channels(group, {"fc/kernel": mask}).tolist()
      [True, False, True]
    """
    producers = [member for member in group.members if member.role == "producer"]
    if not producers or any(member.path not in masks for member in producers):
        return jnp.ones(group.size, bool)
    weights = jnp.zeros(group.size + 1, jnp.int32)  # the last is index -1
    for member in producers:
        mask = masks[member.path]
        others = tuple(i for i in range(mask.ndim) if i != member.axis)
        rows = Slices([mask], [others], shared=False)
        active = rows.join([jnp.sum(mask, axis=others, dtype=jnp.int32)])
        weights = weights.at[member.channels].add(active)
    return weights[:-1] > 0


def coupled_masks(
    groups: Sequence[Group],
    live: Mapping[str, jax.Array],
    leaves: Mapping[str, jax.Array],
    roles: Collection[str],
) -> dict[str, jax.Array]:
    """Mask what belongs to dead channels, in all members of some roles.

    Args:
      groups: of channels.
      live: bool [size] for groups by name, those left out being all alive.
      leaves: arrays by path, whose shapes and shardings the masks take.
      roles: those of the members to mask: "norm" for what the channels emit beside
        their weights (biases, scales and shifts), "consumer" for what reads them.

    Returns:
      Bool arrays by path, False where some axis has the index of a dead channel. There
      is one for each member in ``leaves`` of these roles in a group of ``live``.

    Example:
      >>> import types
      >>> import jax.numpy as jnp, numpy as np
      >>> from sparsejax import masks
      >>> member = types.SimpleNamespace(
      ...     path="bias", axis=0, role="norm", channels=np.arange(3))
      >>> group = types.SimpleNamespace(name="fc", size=3, members=(member,))
      >>> live = {"fc": jnp.array([True, False, True])}
      >>> masks.coupled.coupled_masks([group], live, {"bias": jnp.ones(3)}, ["norm"])
      {'bias': Array([ True, False,  True], dtype=bool)}
    """
    found: dict[str, jax.Array] = {}
    for group in groups:
        for member in group.members:
            known = group.name in live and member.path in leaves
            if not known or member.role not in roles:
                continue
            leaf = leaves[member.path]
            padded = jnp.append(live[group.name], True)  # the last is index -1
            shape = [1] * leaf.ndim
            shape[member.axis] = leaf.shape[member.axis]
            before = found.get(member.path, jnp.ones_like(leaf, dtype=bool))
            found[member.path] = before & padded[member.channels].reshape(shape)
    return found
