"""The passes in a row: from a function and its weights to what can go."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from sparsejax.compaction.coupling import Coupling, Pin
from sparsejax.compaction.errors import CompactionError
from sparsejax.compaction.groups import Group, Grouping, find_groups
from sparsejax.compaction.liveness import Liveness
from sparsejax.compaction.plan import Selection, select
from sparsejax.compaction.program import Equation, Traced


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """Masked channels of a group that stay, and why.

    Attributes:
      group: the group.
      channels: int, the channels.
      why: what keeps them.
      refused: whether an operation cannot do without them; otherwise they are
        constants, or asked to stay.
    """

    group: Group
    channels: np.ndarray
    why: str
    refused: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """What the passes found.

    Attributes:
      coupling: which channels belong together.
      liveness: which the weights leave dead.
      selection: which go.
      grouping: the groups of channels.
      kept: masked channels that stay.
    """

    coupling: Coupling
    liveness: Liveness
    selection: Selection
    grouping: Grouping
    kept: tuple[Kept, ...]


def analyse(
    traced: Traced,
    parameters: Mapping[str, Any],
    *,
    constants: str,
    round_to: int = 1,
    rebuild: bool = False,
    foldable: Callable[[str], bool] = lambda path: True,
    equal: Iterable[tuple[tuple[str, int], ...]] = (),
) -> Analysis:
    """Find the channels of a traced function that can go.

    Args:
      traced: the function.
      parameters: its arrays by path.
      constants: "exact", "interior", "map" or "keep".
      round_to: what kept channels are a multiple of, where possible.
      rebuild: whether a module is to be rebuilt: then arrays that the function closed
        over stay whole, and grouped convolutions keep a group.
      foldable: says of a kernel's path whether its layer can take up constants.
      equal: parameter axes that must keep equally many indices.
    """
    coupling = Coupling(traced, code_stays=rebuild)

    def fold(path: str, exact: bool) -> bool:
        if constants == "keep" or (constants == "exact" and not exact):
            return False
        return foldable(path) and not (rebuild and coupling.uses_of(path) > 1)

    live = functools.partial(Liveness, coupling, parameters, fold)
    liveness = live(interior=constants == "interior")
    selection = select(
        coupling, liveness, round_to=round_to, whole_groups=not rebuild, equal=equal
    )
    grouping = find_groups(coupling)
    masked = Masked(coupling, liveness, selection)
    kept = tuple(masked.kept(grouping, live)) if masked.any() else ()
    return Analysis(coupling, liveness, selection, grouping, kept)


class Masked:
    """Channels whose producers are zero and that stay all the same."""

    def __init__(self, coupling: Coupling, liveness: Liveness, selection: Selection):
        self._coupling, self._liveness = coupling, liveness
        self._resolved, self._revived = selection.resolved, selection.revived
        silent = liveness.silent & ~self._resolved.spread(selection.dead)
        # By all of their producers, or by some.
        self._wholly = self._marks(silent & ~liveness.emitted)
        self._partly = self._marks(silent)
        self._emitted = self._marks(liveness.produced & liveness.emitted)

    def any(self) -> bool:
        """Whether there are any."""
        return bool(self._partly.any())

    def _marks(self, atoms: np.ndarray) -> np.ndarray:
        return self._resolved.marks(np.flatnonzero(atoms))

    def kept(self, grouping: Grouping, live: Callable[..., Liveness]) -> Iterator[Kept]:
        """Yield them by group and reason.

        Args:
          grouping: the groups.
          live: evaluates liveness; ``interior=True`` tells what depends on the input
            from constants that differ at borders.
        """
        pinned_by, pins = self._coupling.pinned_by, self._coupling.pins
        strict = self._liveness
        inside = strict if strict.interior else live(interior=True)
        varying, needed, consumed = map(
            self._marks,
            (inside.varying, strict.needed, strict.consumed),
        )
        for group, leaves in zip(grouping.groups, grouping.leaves, strict=True):
            left, reasons = self._partly[leaves], []
            first = pinned_by[leaves[left]]
            for number in np.unique(first[first >= 0]):
                marked, pin = pinned_by == number, pins[number]
                reasons.append((marked & self._wholly, str(pin), _refuses(pin)))
                reasons.append((marked, str(pin), False))
            for marked, what, refused in (
                (varying & ~self._emitted, "depends on the input", True),
                (needed & ~varying, "leaves a constant", False),
            ):
                if (left & marked[leaves]).any():
                    site = self._site(inside if refused else strict, leaves)
                    why = f"what is left of them {what} at {site}"
                    reasons.append((marked, why, refused))
            reasons.append((self._revived, "they make a size round or equal", False))
            reasons.append((~consumed, "nothing sums over them", False))
            rest = np.ones(len(varying), bool)
            reasons.append((rest, "they are tied to channels without a mask", False))
            for marked, why, refused in reasons:
                here = left & marked[leaves]
                left = left & ~here
                if here.any():
                    yield Kept(group, np.flatnonzero(here), why, refused)

    def _site(self, liveness: Liveness, leaves: np.ndarray) -> Equation:
        """Return an equation that needs some of the leaves."""
        chosen = np.zeros(len(self._resolved.roots), bool)
        chosen[leaves[self._partly[leaves]]] = True
        numbers = liveness.needed_at[self._resolved.spread(chosen)]
        return liveness.sites[numbers[numbers >= 0][0]]


def _refuses(pin: Pin) -> bool:
    return pin.equation is not None or "closed over" in pin.why


def refuse(analysis: Analysis) -> None:
    """Raise where masked channels stay because an operation cannot do without them.

    Raises:
      CompactionError: names the parameters, axes, primitives and source lines.
    """
    problems = [_problem(kept) for kept in analysis.kept if kept.refused]
    if problems:
        raise CompactionError(
            "\n".join(problems) + '\nPass on_unknown="pin" to keep these channels.'
        )


def _problem(kept: Kept) -> str:
    member = kept.group.members[0]
    tied = ", ".join(f"{m.path}[{m.axis}]" for m in kept.group.members)
    return (
        f"{len(kept.channels)} of {kept.group.size} masked channels of {member.path} "
        f"axis {member.axis} kept: {kept.why}; group: {tied}."
    )
