"""Groups of channels that live and die together, as plain data."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from sparsejax.compaction.classes import Classes, Resolved
from sparsejax.compaction.coupling import Coupling

ROLES = ("producer", "consumer", "norm", "statistic")


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """An axis of a parameter, or some of its indices, that belongs to a group.

    Attributes:
      path: the parameter's.
      axis: of the parameter.
      role: "producer" (the outputs of a layer), "norm" (scales and biases by channel),
        "statistic" (means and variances by channel) or "consumer" (the inputs of a
        layer).
      channels: int [size of the axis], the channel of the group that each index
        belongs to; -1 where it belongs to none of this group. A channel may have many
        indices, as where an image is flattened.
    """

    path: str
    axis: int
    role: str
    channels: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Channels of one kind, each of which is removed from all members or from none.

    Attributes:
      name: the layer that first produces them.
      size: how many channels there are.
      members: in the order in which the program uses them.
      pinned: why channels cannot be removed, or None.
      removable: bool [size], the channels that could be.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    pinned: str | None
    removable: np.ndarray

    @property
    def free(self) -> bool:
        """Whether every channel could be removed."""
        return bool(self.removable.all())

    def where(self, *roles: str) -> tuple[Member, ...]:
        """Return the members of some roles."""
        return tuple(member for member in self.members if member.role in roles)


@dataclasses.dataclass(frozen=True, eq=False)
class Grouping:
    """The groups of a program, and the leaf atom of each of their channels."""

    groups: tuple[Group, ...]
    leaves: tuple[np.ndarray, ...]


def find_groups(coupling: Coupling) -> Grouping:
    """Return the groups of a program's channels.

    Channels that one layer produces form one group, so that a concatenation of two
    layers' outputs is two groups, and heads and their dimensions are two.
    """
    resolved = coupling.resolved
    columns = list(_columns(coupling, resolved))
    family = _families(columns, len(resolved.roots))
    members: dict[int, list[tuple[str, int, str, np.ndarray]]] = defaultdict(list)
    for path, axis, role, leaves in columns:
        of = np.where(leaves >= 0, family[leaves], -1)
        for root in np.unique(of[of >= 0]):
            members[root].append((path, axis, role, np.where(of == root, leaves, -1)))
    groups, found = [], []
    names: set[str] = set()
    for parts in members.values():
        leaves = _ordered(parts)
        channel = np.full(len(resolved.roots) + 1, -1)
        channel[leaves] = np.arange(len(leaves))
        pinned_by = coupling.pinned_by[leaves]
        stays = pinned_by >= 0
        why = str(coupling.pins[pinned_by[stays].min()]) if stays.any() else None
        name = _name(parts, names)
        names.add(name)
        listed = tuple(
            Member(path, axis, role, channel[which])
            for path, axis, role, which in parts
        )
        groups.append(Group(name, len(leaves), listed, why, ~stays))
        found.append(leaves)
    return Grouping(tuple(groups), tuple(found))


def _columns(
    coupling: Coupling, resolved: Resolved
) -> Iterator[tuple[str, int, str, np.ndarray]]:
    """Yield (path, axis, role, leaf atoms) in the order of use, for each factor."""
    for (path, axis), roles in coupling.roles.items():
        labels = coupling.parameter_axes[path][axis]
        if labels is not None and not path.startswith("<"):
            role = next(role for role in ROLES if role in roles)
            for column in resolved.leaf_columns(labels.atoms).T:
                yield path, axis, role, column


def _families(columns: list, size: int) -> np.ndarray:
    """Return int [atoms]: one number for all leaves that a layer produces together."""
    families = Classes()
    families.fresh(size)
    produced = np.zeros(size, bool)
    for role in ("producer", "other"):
        for _, _, own, leaves in columns:
            leaves = leaves[leaves >= 0]
            if (own == "producer") != (role == "producer"):
                continue
            if role == "other":
                leaves = leaves[~produced[leaves]]
            else:
                produced[leaves] = True
            if leaves.size:
                families.unite(leaves, np.full_like(leaves, leaves.min()))
    return families.roots(np.arange(size))


def _ordered(parts: list) -> np.ndarray:
    """Return a group's leaves in the order of its first member's indices."""
    leaves = np.concatenate([which[which >= 0] for *_, which in parts])
    unique, first = np.unique(leaves, return_index=True)
    return unique[np.argsort(first)]


def _name(parts: list, taken: set[str]) -> str:
    """Return the layer that first produces a group; its axis too where it needs it."""
    producers = [part for part in parts if part[2] == "producer"]
    path, axis, *_ = (producers or parts)[0]
    layer = path.rpartition("/")[0] or path
    number, name = 0, layer if producers else f"{layer}[{axis}]"
    while name in taken:
        name = f"{layer}[{axis}]" if not number else f"{layer}[{axis}.{number}]"
        number += 1
    return name
