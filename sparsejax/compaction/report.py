"""What compaction found and did, as data and as a table."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsejax.compaction.analysis import Analysis
from sparsejax.compaction.groups import Group
from sparsejax.compaction.subjects import Subject


@dataclasses.dataclass(frozen=True)
class Report:
    """Groups of channels, and what became of them.

    Attributes:
      groups: all groups, in the order in which the program produces them.
      removed: by name of the group, how many of its channels went.
      kept: by name of the group, why masked channels of it stay.
      plan: what is left of every parameter; None of `channel_groups`.
      parameters: numbers of parameters before and after.
      seconds: how long tracing and analysis took.
      read: gives the arrays of a model of this kind.
      max_error: largest absolute difference to the masked model's outputs; None where
        it was not measured.
      scale: largest absolute output of the masked model.
    """

    groups: tuple[Group, ...]
    removed: Mapping[str, int]
    kept: Mapping[str, str]
    plan: Any
    parameters: tuple[int, int]
    seconds: float
    read: Callable[[Any], Subject] = dataclasses.field(repr=False)
    max_error: float | None = None
    scale: float | None = None

    def __getitem__(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(
            f"There is no group {name!r}; there are "
            f"{', '.join(group.name for group in self.groups)}."
        )

    def zero(self, model: Any, channels: Mapping[str, Iterable[int]]) -> Any:
        """Mask whole channels: zero their producers, norms and consumers.

        Statistics of norms stay. What is masked so can always be removed, unless its
        group is pinned.

        Args:
          model: the model, or tree of parameters, that the report is of.
          channels: by name of a group, the channels.

        Returns:
          A new model, or tree of parameters.

        Raises:
          KeyError: no group of that name.
          ValueError: a channel that the group does not have.
        """
        dead: dict[str, list[tuple[int, np.ndarray]]] = {}
        for name, some in channels.items():
            group = self[name]
            chosen = np.zeros(group.size + 1, bool)
            indices = np.asarray(list(some), int)
            if indices.size and not (0 <= indices).all() & (indices < group.size).all():
                raise ValueError(
                    f"report.zero: the channels of {name} must lie in [0, "
                    f"{group.size}), got {indices.tolist()}."
                )
            chosen[indices] = True
            for member in group.where("producer", "norm", "consumer"):
                dead.setdefault(member.path, []).append(
                    (member.axis, chosen[member.channels])
                )

        def masked(path: str, array: Any) -> Any:
            if path not in dead:
                return array
            gone = np.zeros(array.shape, bool)
            for axis, indices in dead[path]:
                gone[(slice(None),) * axis + (indices,)] = True
            return jnp.where(gone, jnp.zeros((), array.dtype), array)

        subject = self.read(model)
        return subject.assemble(
            {path: masked(path, array) for path, array in subject.arrays.items()}
        )

    def __str__(self) -> str:
        rows = [("group", "channels", "removed", "members", "")]
        for group in self.groups:
            removed = self.removed.get(group.name, 0)
            rows.append(
                (
                    group.name,
                    str(group.size),
                    str(removed),
                    str(len(group.members)),
                    self.kept.get(group.name) or _pinned(group),
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        before, after = self.parameters
        lines.append(
            f"parameters: {before:,} -> {after:,}; analysis took {self.seconds:.2f} s"
        )
        if self.max_error is not None:
            lines.append(
                f"largest difference {self.max_error:.2g} at outputs up to "
                f"{self.scale:.2g}"
            )
        return "\n".join(lines)


def _pinned(group: Group) -> str:
    if group.pinned is None:
        return ""
    some = "" if not group.removable.any() else f"{(~group.removable).sum()} "
    return f"{some}pinned: {group.pinned}"


def make_report(
    analysis: Analysis,
    *,
    plan: Any,
    parameters: tuple[int, int],
    seconds: float,
    read: Callable[[Any], Subject],
) -> Report:
    """Return the report of an analysis."""
    grouping, dead = analysis.grouping, analysis.selection.dead
    removed = {
        group.name: int(dead[leaves].sum())
        for group, leaves in zip(grouping.groups, grouping.leaves, strict=True)
        if dead[leaves].any()
    }
    kept: dict[str, str] = {}
    for one in analysis.kept:
        text = f"{len(one.channels)} masked stay: {one.why}"
        known = kept.get(one.group.name)
        kept[one.group.name] = f"{known}; {text}" if known else text
    return Report(grouping.groups, removed, kept, plan, parameters, seconds, read)
