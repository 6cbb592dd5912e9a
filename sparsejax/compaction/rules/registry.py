"""The table of rules, and the rule for what is not in it."""

from collections.abc import Callable
from typing import Any, NamedTuple


def _nothing(liveness: Any, equation: Any, ins: list) -> list:
    """Know nothing of the outputs."""
    return [liveness.nothing(value) for value in equation.outputs]


def bind(rewriter: Any, equation: Any, ins: list, **changed: Any) -> list:
    """Apply the primitive as it is, but for some parameters."""
    primitive = equation.primitive
    outputs = primitive.bind(*ins, **{**equation.params, **changed})
    return list(outputs) if primitive.multiple_results else [outputs]


class Rule(NamedTuple):
    """What is to be known of a primitive.

    Attributes:
      couple: (Coupling, Equation) -> axes of each output.
      evaluate: (Liveness, Equation, [Known]) -> [Known], one for each output.
      rewrite: (Rewriter, Equation, [array]) -> [array], one for each output.
    """

    couple: Callable[[Any, Any], list]
    evaluate: Callable[[Any, Any, list], list] = _nothing
    rewrite: Callable[[Any, Any, list], list] = bind


def _unknown(coupling: Any, equation: Any) -> list:
    """Keep every channel that reaches the primitive."""
    for value in equation.inputs:
        for axis in coupling.of(value):
            coupling.pin(axis, "has no channel rule", equation)
    return [[None] * len(value.shape) for value in equation.outputs]


_RULES: dict[str, Rule] = {}
_UNKNOWN = Rule(_unknown)


def register(*names: str, **functions: Callable) -> None:
    """Give primitives of these names a rule."""
    _RULES.update(dict.fromkeys(names, Rule(**functions)))


def rule_of(equation: Any) -> Rule:
    """Return the rule of an equation's primitive."""
    return _RULES.get(equation.name, _UNKNOWN)
