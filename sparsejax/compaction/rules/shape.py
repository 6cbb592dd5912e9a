"""Primitives that move entries: axes are taken along."""

import numpy as np
from jax import lax

from sparsejax.compaction.known import Known
from sparsejax.compaction.rules.registry import register


def _move(function):
    """Make an evaluation that moves values and what is unknown of them alike."""

    def evaluate(liveness, equation, ins):
        values = function(liveness, equation, [one.value for one in ins])
        unknowns = function(liveness, equation, [one.unknown for one in ins])
        return [Known(*pair) for pair in zip(values, unknowns, strict=True)]

    return evaluate


# Transposition.


def _couple_transpose(coupling, equation):
    axes = coupling.of(equation.inputs[0])
    return [[axes[int(i)] for i in equation.params["permutation"]]]


def _transposed(liveness, equation, ins):
    return [ins[0].transpose([int(i) for i in equation.params["permutation"]])]


register("transpose", couple=_couple_transpose, evaluate=_move(_transposed))


# Broadcasting.


def _couple_broadcast(coupling, equation):
    source, (output,) = equation.inputs[0], equation.outputs
    places = [int(i) for i in equation.params["broadcast_dimensions"]]
    axes = [coupling.fresh(n) for n in output.shape]
    for place, axis, n in zip(places, coupling.of(source), source.shape, strict=True):
        if n == output.shape[place]:
            axes[place] = axis
    return [axes]


def _broadcast(liveness, equation, ins):
    shape = liveness.shape(equation.outputs[0])
    places = [int(i) for i in equation.params["broadcast_dimensions"]]
    spread = np.expand_dims(ins[0], [i for i in range(len(shape)) if i not in places])
    return [np.broadcast_to(spread, shape)]


def _rewrite_broadcast(rewriter, equation, ins):
    places = tuple(int(i) for i in equation.params["broadcast_dimensions"])
    return [
        lax.broadcast_in_dim(ins[0], rewriter.shape(equation.outputs[0]), places),
    ]


register(
    "broadcast_in_dim",
    couple=_couple_broadcast,
    evaluate=_move(_broadcast),
    rewrite=_rewrite_broadcast,
)


# Axes of size one.


def _couple_squeeze(coupling, equation):
    gone = [int(i) for i in equation.params["dimensions"]]
    axes = coupling.of(equation.inputs[0])
    return [[axis for i, axis in enumerate(axes) if i not in gone]]


def _squeezed(liveness, equation, ins):
    return [ins[0].reshape(liveness.shape(equation.outputs[0]))]


register("squeeze", couple=_couple_squeeze, evaluate=_move(_squeezed))


# Reversal.


def _couple_rev(coupling, equation):
    axes = list(coupling.of(equation.inputs[0]))
    for index in equation.params["dimensions"]:
        axes[index] = axes[index] and axes[index].take(slice(None, None, -1))
    return [axes]


def _reversed(liveness, equation, ins):
    return [np.flip(ins[0], equation.params["dimensions"])]


register("rev", couple=_couple_rev, evaluate=_move(_reversed))
