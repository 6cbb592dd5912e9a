"""Sums over channels, which dead ones may leave; other reductions none may leave."""

import math

import numpy as np

from sparsejax.compaction.known import Known
from sparsejax.compaction.rules.registry import register

_NUMPY = {
    "reduce_sum": np.sum,
    "reduce_max": np.max,
    "reduce_min": np.min,
    "reduce_prod": np.prod,
    "reduce_and": np.all,
    "reduce_or": np.any,
}
_OTHERS = ("argmax", "argmin", "reduce_xor")


def _reduced(equation):
    return [int(i) for i in equation.params["axes"]]


def _couple(coupling, equation):
    gone, axes = _reduced(equation), coupling.of(equation.inputs[0])
    if equation.name != "reduce_sum":
        for i in gone:
            coupling.pin(axes[i], "reduces over channels", equation)
    return [[axis for i, axis in enumerate(axes) if i not in gone]]


def _evaluate(liveness, equation, ins):
    (one,), (source,) = ins, equation.inputs
    gone = tuple(_reduced(equation))
    axes = liveness.coupling.of(source)
    if equation.name == "reduce_sum" and any(axes[i] for i in gone):
        others = tuple(i for i in range(one.value.ndim) if i not in gone)
        order = sorted(gone)
        summed = tuple(axes[i] for i in order)
        terms = one.may.any(others), one.unknown.any(others)
        liveness.consume(summed, *terms, equation)
    sizes = [source.shape[i] for i in gone if one.value.shape[i] == 1]
    if not all(isinstance(n, int | np.integer) for n in sizes):
        return [liveness.nothing(equation.outputs[0])]
    value, unknown = one.value, one.unknown.any(gone)
    if equation.name == "reduce_sum":
        value = one.clean.sum(gone, dtype=value.dtype) * value.dtype.type(
            math.prod(sizes)
        )
    elif equation.name == "reduce_prod":
        value = (one.value ** math.prod(sizes)).prod(gone)
    else:
        value = _NUMPY[equation.name](value, axis=gone)
    return [Known(np.asarray(value, equation.outputs[0].dtype), unknown)]


register(*_NUMPY, couple=_couple, evaluate=_evaluate)
register(*_OTHERS, couple=_couple)
