"""Windows that slide over space: pooling."""

import math

from sparsejax.compaction.known import Known
from sparsejax.compaction.rules.registry import register

_NAMES = ("reduce_window_max", "reduce_window_min", "reduce_window_sum")


def _still(equation, axis):
    """Say whether the window leaves an axis as it is."""
    params = equation.params
    return (
        params["window_dimensions"][axis] == params["window_strides"][axis] == 1
        and params["base_dilation"][axis] == 1
        and tuple(params["padding"][axis]) == (0, 0)
    )


def _couple(coupling, equation):
    axes = list(coupling.of(equation.inputs[0]))
    for index, axis in enumerate(axes):
        if axis is not None and not _still(equation, index):
            coupling.pin(axis, "slides a window over channels", equation)
            axes[index] = None
    return [axes for _ in equation.outputs]


def _evaluate(liveness, equation, ins):
    (one,), params = ins, equation.params
    moving = tuple(i for i in range(one.value.ndim) if not _still(equation, i))
    one = one.collapse(moving)
    whole = all(tuple(pair) == (0, 0) for pair in params["padding"]) and all(
        step == 1 for step in params["base_dilation"]
    )
    if equation.name == "reduce_window_sum":
        size = one.value.dtype.type(math.prod(params["window_dimensions"]))
        # A padded window has fewer terms at the border: only zero stays the same.
        return [
            Known(
                one.value * size, one.unknown if whole or liveness.interior else one.may
            )
        ]
    # The largest of equal values is that value; what is padded never wins or loses.
    return [Known(one.value, one.unknown)]


register(*_NAMES, couple=_couple, evaluate=_evaluate)


register("reduce_window", couple=_couple)
