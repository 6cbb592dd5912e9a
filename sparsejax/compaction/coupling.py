"""Pass one: which channels are tied together, read from a program's equations.

Every axis of every value is either fixed (None: batch, space, tokens, size one) or an
`Axis`, an atom for each index. Rules (`sparsejax.compaction.rules`) unite atoms.
"""

import dataclasses
import functools
from collections import defaultdict

import numpy as np

from sparsejax.compaction import rules
from sparsejax.compaction.axes import Axes, Axis, Origin
from sparsejax.compaction.classes import Atoms, Classes, Resolved
from sparsejax.compaction.program import Equation, Literal, Program, Traced, Value


@dataclasses.dataclass(frozen=True)
class Pin:
    """Atoms that stay, and why."""

    atoms: Atoms
    why: str
    equation: Equation | None = None

    def __str__(self) -> str:
        return f"{self.equation} {self.why}" if self.equation else self.why


class Coupling:
    """The axes of a program's values and the classes of their atoms.

    Attributes:
      axes: of every value.
      parameter_axes: of every parameter by path, and of arrays that were closed over.
      classes: of the atoms in them.
      pins: atoms that no rule can remove.
      roles: for every parameter axis how it is used: "producer", "consumer", "norm",
        "statistic".
      groups_of: the group axis of every grouped convolution by its kernel's path.
      uses: for every contraction with a parameter, (path, n-th such use).
    """

    def __init__(self, traced: Traced, *, code_stays: bool = False):
        self.traced = traced
        self.classes = Classes()
        self.parameter_axes: dict[str, Axes] = {}
        self.axes: dict[Value, Axes] = {}
        self.pins: list[Pin] = []
        self.roles: dict[tuple[str, int], set[str]] = defaultdict(set)
        self.groups_of: dict[str, Atoms] = {}
        self.uses: dict[Equation, tuple[str, int]] = {}
        self._uses_of: dict[str, int] = defaultdict(int)
        self._derived: set[Value] = set()
        self._code_stays = code_stays
        named = zip(traced.program.inputs, traced.paths, strict=True)
        for value, path in named:
            if path is None:
                self.axes[value] = [None] * len(value.shape)
            else:
                self.axes[value] = self._parameter(value, path)
        self.run(traced.program)
        for number, value in enumerate(traced.program.outputs):
            for axis, found in enumerate(self.of(value)):
                self.pin(found, f"model output {number}, axis {axis}")

    def _parameter(self, value: Value, path: str) -> Axes:
        self._derived.add(value)
        self.parameter_axes[path] = [
            self.fresh(n, frozenset([Origin(path, axis)]))
            for axis, n in enumerate(value.shape)
        ]
        return self.parameter_axes[path]

    def run(self, program: Program) -> None:
        """Label all values of a program whose inputs have their axes."""
        for value in program.constants:
            if value not in self.axes:
                name = f"<constant {len(self.parameter_axes)}>"
                self.axes[value] = self._parameter(value, name)
            for axis in self.axes[value]:
                self.fix(axis, "an array that the function closed over")
        for equation in program.equations:
            derived = all(self.is_derived(value) for value in equation.inputs)
            self.axes.update(
                zip(
                    equation.outputs,
                    rules.rule_of(equation).couple(self, equation),
                    strict=True,
                )
            )
            for value in equation.outputs:
                if derived:
                    self._derived.add(value)
                else:
                    self._derived.discard(value)
                    self.axes[value] = [
                        axis and Axis(axis.atoms) for axis in self.axes[value]
                    ]

    # What the passes after this one ask.

    @functools.cached_property
    def resolved(self) -> Resolved:
        """The classes, which change no more once everything is labelled."""
        return self.classes.resolve()

    @functools.cached_property
    def pinned_by(self) -> np.ndarray:
        """Int [atoms]: for leaves that stay the number of their first pin, or -1."""
        first = np.full(len(self.resolved.roots), -1)
        for number in reversed(range(len(self.pins))):
            first[self.resolved.marks(self.pins[number].atoms)] = number
        return first

    # What rules ask and do.

    def of(self, value: Value) -> Axes:
        """Return the axes of a value."""
        return [] if isinstance(value, Literal) else self.axes[value]

    def is_derived(self, value: Value) -> bool:
        """Say whether a value depends on parameters only."""
        return isinstance(value, Literal) or value in self._derived

    def mark_derived(self, value: Value, derived: bool) -> None:
        """Say so of an input of a body."""
        (self._derived.add if derived else self._derived.discard)(value)

    def fresh(self, n: object, origin: frozenset[Origin] = frozenset()) -> Axis | None:
        """Return an axis of n new atoms; None, fixed, for sizes 0, 1 and symbolic."""
        if not isinstance(n, int | np.integer) or n < 2:
            return None
        return Axis(self.classes.fresh(int(n)), origin)

    def pin(
        self, axis: Axis | None, why: str, equation: Equation | None = None
    ) -> None:
        """Keep all indices of an axis."""
        if axis is not None:
            self.pins.append(Pin(axis.atoms, why, equation))

    def fix(
        self, axis: Axis | None, why: str, equation: Equation | None = None
    ) -> None:
        """Keep all indices of what is in the code, where the code stays as it is."""
        if self._code_stays:
            self.pin(axis, why, equation)

    def join(self, a: Axis | None, b: Axis | None, equation: Equation) -> Axis | None:
        """Return the axis that two axes of one size become where they meet."""
        if a is None or b is None:
            self.pin(a or b, "meets an axis that is not one of channels", equation)
            return None
        self.classes.unite(a.atoms, b.atoms)
        return Axis(a.atoms, a.origin | b.origin)

    def play(self, role: str, axis: Axis | None) -> None:
        """Note the role of the parameter axes that an axis comes from."""
        for origin in axis.origin if axis else ():
            self.roles[origin.path, origin.axis].add(
                "statistic" if origin.statistic and role == "norm" else role
            )

    def uses_of(self, path: str) -> int:
        """Return how many contractions use a parameter."""
        return self._uses_of[path]

    def meet(self, equation: Equation) -> None:
        """Note parameters that an equation puts beside what depends on the input."""
        own = [value for value in equation.inputs if self.is_derived(value)]
        if len(own) < len(equation.inputs):
            for axis in (axis for value in own for axis in self.of(value)):
                self.play("norm", axis)

    def use(self, equation: Equation, weight: Value) -> None:
        """Note that a contraction uses a value that comes from one parameter."""
        paths = {o.path for axis in self.of(weight) if axis for o in axis.origin}
        if len(paths) == 1 and equation not in self.uses:
            (path,) = paths
            self.uses[equation] = path, self._uses_of[path]
            self._uses_of[path] += 1
