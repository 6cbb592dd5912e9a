"""The axes of values whose indices may be removed."""

import dataclasses
from typing import NamedTuple

import numpy as np

from sparsejax.compaction.classes import Atoms


class Origin(NamedTuple):
    """An axis of a parameter."""

    path: str
    axis: int
    statistic: bool = False  # it was a divisor or was subtracted on its way


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """An axis whose indices may be removed."""

    atoms: Atoms  # one for each index
    origin: frozenset[Origin] = frozenset()  # empty for what depends on the input

    def __len__(self) -> int:
        return len(self.atoms)

    def take(self, indices: np.ndarray | slice) -> "Axis":
        """Return the axis of some of the indices."""
        return Axis(self.atoms[indices], self.origin)


Axes = list[Axis | None]
