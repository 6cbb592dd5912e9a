"""Which channels go: dead, not pinned, and consistent for every parameter."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from sparsejax.compaction.axes import Axes, Axis
from sparsejax.compaction.coupling import Coupling
from sparsejax.compaction.liveness import Constant, Liveness


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is left of every parameter.

    Attributes:
      keep: by path, for each axis the kept indices, int and sorted, or None for all.
      feature_groups: by the kernel's path, groups left of a grouped convolution.
      factors: by (path, axis) of an axis that is a product, how many of each factor are
        left, as (groups, channels of a group) of a GroupNorm's scale.
      folds: by the kernel's path, what the layer adds to its output for constants that
        it no longer receives, by kept output channel.
    """

    keep: dict[str, tuple[np.ndarray | None, ...]]
    feature_groups: dict[str, int] = dataclasses.field(default_factory=dict)
    factors: dict[tuple[str, int], tuple[int, ...]] = dataclasses.field(
        default_factory=dict
    )
    folds: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Selection:
    """The channels that go, of all axes of a program."""

    def __init__(self, coupling: Coupling, dead: np.ndarray):
        """Select leaf atoms, ``dead`` being bool [atoms]."""
        self.coupling = coupling
        self.resolved = coupling.resolved
        self.dead = dead
        self.revived = np.zeros_like(dead)
        self._gone = self.resolved.spread(dead)

    def kept(self, axis: Axis) -> np.ndarray:
        """Return the indices of an axis that stay, sorted."""
        return np.flatnonzero(~self._gone[axis.atoms])

    def revive(self, atoms: np.ndarray) -> None:
        """Keep some atoms, and what they are products of, after all."""
        back = self.dead & self.resolved.marks(atoms)
        self.dead, self.revived = self.dead & ~back, self.revived | back
        self._gone = self.resolved.spread(self.dead)

    def living(self, axes: Axes) -> tuple[np.ndarray | None, ...]:
        """Return for each axis bool [indices, factors]: which factors are alive."""
        columns = [
            None if axis is None else self.resolved.leaf_columns(axis.atoms)
            for axis in axes
        ]
        return tuple(
            None if leaves is None else (leaves < 0) | ~self.dead[leaves]
            for leaves in columns
        )

    def keep(self) -> dict[str, tuple[np.ndarray | None, ...]]:
        """Return the kept indices of every parameter."""
        return {
            path: tuple(
                self._indices(axis) for axis in self.coupling.parameter_axes[path]
            )
            for path in self.coupling.traced.parameters
        }

    def _indices(self, axis: Axis | None) -> np.ndarray | None:
        if axis is None or len(kept := self.kept(axis)) == len(axis):
            return None
        return kept

    def of(self, path: str, axis: int) -> Axis | None:
        """Return an axis of a parameter."""
        return self.coupling.parameter_axes[path][axis]


def select(
    coupling: Coupling,
    liveness: Liveness,
    *,
    round_to: int,
    whole_groups: bool,
    equal: Iterable[tuple[tuple[str, int], ...]],
) -> Selection:
    """Select all dead channels that may go.

    Args:
      coupling: of the program.
      liveness: of the same program.
      round_to: what kept channels are a multiple of where dead ones allow it. Of
        features of several axes, as ``[heads, head_dim]``, the last alone is rounded.
      whole_groups: whether a grouped convolution may lose all its groups.
      equal: axes, as (path, axis), that must keep equally many indices.
    """
    marks = lambda mask: coupling.resolved.marks(np.flatnonzero(mask))
    dead = marks(liveness.consumed) & ~marks(liveness.needed)
    selection = Selection(coupling, dead & (coupling.pinned_by < 0))
    if not whole_groups:
        for atoms in coupling.groups_of.values():
            _fill(selection, Axis(atoms), 1)
    before = None
    while before is None or not np.array_equal(before, selection.dead):
        before = selection.dead
        for path, index in _rounded_axes(coupling):
            if (axis := selection.of(path, index)) is not None:
                kept = len(selection.kept(axis))
                _fill(selection, axis, -(-kept // round_to) * round_to)
        for names in equal:
            axes = [axis for name in names if (axis := selection.of(*name)) is not None]
            most = max((len(selection.kept(axis)) for axis in axes), default=0)
            for axis in axes:
                _fill(selection, axis, most)
    return selection


def _fill(selection: Selection, axis: Axis, count: int) -> None:
    """Revive dead indices of an axis, the lowest first, until ``count`` are kept."""
    while len(kept := selection.kept(axis)) < min(count, len(axis)):
        gone = np.setdiff1d(np.arange(len(axis)), kept)
        selection.revive(axis.atoms[gone[: count - len(kept)]])


def _rounded_axes(coupling: Coupling) -> list[tuple[str, int]]:
    """List the parameter axes that are to be of a round size."""
    last: dict[tuple[str, str], int] = {}
    for (path, axis), roles in coupling.roles.items():
        if path in coupling.traced.parameters and coupling.parameter_axes[path][axis]:
            for role in roles:
                last[path, role] = max(axis, last.get((path, role), 0))
    return [(path, axis) for (path, _), axis in last.items()]


def make_plan(selection: Selection, constants: Iterable[Constant]) -> Plan:
    """Put down what a selection leaves of every parameter."""
    coupling = selection.coupling
    groups = {
        path: len(selection.kept(Axis(atoms)))
        for path, atoms in coupling.groups_of.items()
    }
    factors = {}
    for path in coupling.traced.parameters:
        for index, axis in enumerate(coupling.parameter_axes[path]):
            if axis is not None:
                columns = selection.resolved.leaf_columns(
                    axis.atoms[selection.kept(axis)]
                )
                if columns.shape[1] > 1:
                    factors[path, index] = tuple(
                        len(np.unique(column)) for column in columns.T
                    )
    folds = {
        coupling.uses[constant.equation][0]: folded(selection, constant)
        for constant in constants
        if dropped(selection, constant).any()
    }
    return Plan(selection.keep(), groups, factors, folds)


def dropped(selection: Selection, constant: Constant) -> np.ndarray:
    """Return bool [channels]: constants that a contraction no longer receives."""
    gone = constant.nonzero.copy()
    gone[selection.kept(constant.axis)] = False
    return gone


def folded(selection: Selection, constant: Constant) -> np.ndarray:
    """Return what dropped constants add to each kept output, by its channel axes."""
    total = constant.contributions[dropped(selection, constant)].sum(0)
    axes = selection.coupling.of(constant.equation.outputs[0])
    labelled = [axis for axis in axes if axis is not None]
    total = total.reshape([len(axis) for axis in labelled])
    for number, axis in enumerate(labelled):
        total = total.take(selection.kept(axis), axis=number)
    return total
