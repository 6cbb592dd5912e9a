"""Pass two: which channels contribute nothing, derived from the weights.

The program is evaluated with its input unknown (`Known`). Wherever channels are summed
over, a channel that is zero there, or meets a weight of zero, is not needed. Finite
activations are assumed: zero times anything is zero.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sparsejax.compaction import known, rules
from sparsejax.compaction.axes import Axis
from sparsejax.compaction.coupling import Coupling
from sparsejax.compaction.known import Known
from sparsejax.compaction.program import (
    Equation,
    Literal,
    Program,
    Value,
    literal_array,
)


@dataclasses.dataclass(frozen=True)
class Constant:
    """Channels that reach weights as constants other than zero.

    Attributes:
      equation: the contraction.
      axis: the axis of these channels.
      values: [channels], what they are.
      nonzero: bool [channels], where that counts.
      contributions: [channels, outputs], what each adds to each output.
      exact: whether it adds the same to all positions of an output.
    """

    equation: Equation
    axis: Axis
    values: np.ndarray
    nonzero: np.ndarray
    contributions: np.ndarray
    exact: bool


class Liveness:
    """What the weights say of every atom.

    Args:
      coupling: of the program.
      parameters: arrays by path.
      fold: says of (parameter path, exact) whether a constant that its contraction
        receives may be folded; exact where all positions of the output get the same.
      interior: whether to take constants at padded borders for what they are inside.

    Attributes:
      consumed: bool [atoms], summed over somewhere.
      needed: bool [atoms], not zero in such a sum, nor folded.
      varying: bool [atoms], dependent on the input there.
      needed_at: by atom, number in `sites` of an equation that needs it: of the first
        in which it varies, where it does.
      produced: bool [atoms], an output of a layer with weights.
      emitted: bool [atoms], with weights other than zero there.
      silent: bool [atoms], an output of which one layer's weights are all zero.
      constants: channels that may be folded.
    """

    def __init__(
        self,
        coupling: Coupling,
        parameters: Mapping[str, Any],
        fold: Callable[[str, bool], bool],
        *,
        interior: bool = False,
    ):
        self.coupling = coupling
        self.interior = interior
        self.in_body = False
        self._may_fold = fold
        size = len(coupling.resolved.roots)
        self.consumed, self.needed, self.varying = (
            np.zeros(size, bool) for _ in range(3)
        )
        self.produced, self.emitted, self.silent = (
            np.zeros(size, bool) for _ in range(3)
        )
        self.needed_at = np.full(size, -1)
        self.sites: list[Equation] = []
        self.constants: list[Constant] = []
        self._environment: dict[Value, Known] = {}
        program = coupling.traced.program
        paths = coupling.traced.paths
        for value, path in zip(program.inputs, paths, strict=True):
            self.set(
                value,
                self.nothing(value)
                if path is None
                else known.certain(np.asarray(parameters[path])),
            )
        with np.errstate(all="ignore"):
            self.run(program)

    def run(self, program: Program) -> None:
        """Evaluate a program whose inputs are set."""
        for value, constant in program.constants.items():
            if isinstance(value.dtype, np.dtype):
                self.set(value, known.certain(np.asarray(constant)))
            else:  # a random key
                self.set(value, self.nothing(value))
        for equation in program.equations:
            evaluate = rules.rule_of(equation).evaluate
            results = evaluate(self, equation, [self.get(v) for v in equation.inputs])
            for value, result in zip(equation.outputs, results, strict=True):
                self.set(value, result)

    def get(self, value: Value) -> Known:
        """Return what is known of a value."""
        if isinstance(value, Literal):
            return known.certain(literal_array(value))
        return self._environment[value]

    def set(self, value: Value, result: Known) -> None:
        """Note what is known of a value; fixed axes are collapsed."""
        axes = self.coupling.axes[value]
        fixed = tuple(i for i, axis in enumerate(axes) if axis is None)
        self._environment[value] = result.collapse(fixed)

    def shape(self, value: Value) -> tuple[int, ...]:
        """Return the shape in which a value is known."""
        axes = self.coupling.of(value)
        return tuple(1 if axis is None else len(axis) for axis in axes)

    def nothing(self, value: Value) -> Known:
        """Return that nothing is known of a value."""
        dtype = value.dtype if isinstance(value.dtype, np.dtype) else np.dtype(bool)
        return known.unknown(self.shape(value), dtype)

    def consume(
        self,
        axes: tuple[Axis | None, ...],
        needed: np.ndarray,
        varying: np.ndarray,
        equation: Equation,
    ) -> None:
        """Note channels that an equation sums over.

        Args:
          axes: those that it sums over.
          needed: bool, a dimension for each of them: where a term may be nonzero.
          varying: likewise, where a term depends on the input.
          equation: the sum.
        """
        for number, axis in enumerate(axes):
            if axis is not None:
                roots = self.coupling.classes.roots(axis.atoms)
                self.consumed[roots] = True
                others = tuple(i for i in range(needed.ndim) if i != number)
                for where, mark in ((needed, self.needed), (varying, self.varying)):
                    here = np.broadcast_to(where.any(axis=others), len(axis))
                    new = roots[here & ~mark[roots]]
                    mark[new] = True
                    self.needed_at[new] = len(self.sites)
        self.sites.append(equation)

    def produce(self, axes: tuple[Axis | None, ...], emitted: np.ndarray) -> None:
        """Note outputs of a layer, ``emitted`` where its weights are not all zero.

        A layer of zeros alone may be one whose inputs are masked: its outputs are
        silent, and yet nobody asks for their removal.
        """
        all_silent = not emitted.any()
        for number, axis in enumerate(axes):
            if axis is not None:
                others = tuple(i for i in range(emitted.ndim) if i != number)
                here = np.broadcast_to(emitted.any(axis=others), len(axis))
                roots = self.coupling.classes.roots(axis.atoms)
                self.produced[roots] = True
                self.emitted[roots if all_silent else roots[here]] = True
                self.silent[roots[~here]] = True

    def fold(
        self,
        equation: Equation,
        axis: Axis,
        activation: Known,
        weight: Known,
        exact: bool = True,
    ) -> np.ndarray:
        """Note constants that a contraction receives, where they may be folded.

        Args:
          equation: the contraction.
          axis: the contracted axis.
          activation: `Known` [channels].
          weight: `Known` [channels, outputs].
          exact: whether a constant adds the same to all positions of an output.

        Returns:
          bool [channels]: the channels that are not needed on this account.
        """
        nonzero = activation.may & ~activation.unknown & ~weight.unknown.any(1)
        nonzero &= weight.may.any(1)
        path = self.coupling.uses.get(equation, (None,))[0]
        if path is None or self.in_body or not self._may_fold(path, exact):
            return np.zeros_like(nonzero)
        if nonzero.any():
            terms = weight.clean * activation.clean.astype(np.float32)[:, None]
            self.constants.append(
                Constant(equation, axis, activation.clean, nonzero, terms, exact)
            )
        return nonzero
