"""Primitives to which the place of an entry along an axis means something.

Channels along such an axis stay; the other axes pass.
"""

import numpy as np
from jax import lax

from sparsejax.compaction.known import certain
from sparsejax.compaction.rules.registry import bind, register


def _couple_along(find):
    """Make a rule from a function that gives the axes an equation works along."""

    def couple(coupling, equation):
        first, *others = (coupling.of(value) for value in equation.inputs)
        axes = list(first)
        for index in range(len(axes)):
            for other in others:
                axes[index] = coupling.join(axes[index], other[index], equation)
        for index in find(equation):
            coupling.pin(axes[index], "orders or combines channels", equation)
            axes[index] = None
        return [axes for _ in equation.outputs]

    return couple


def _transformed(equation):
    rank = len(equation.inputs[0].shape)
    return range(rank - len(equation.params["fft_lengths"]), rank)


register(
    "cumlogsumexp",
    "cummax",
    "cummin",
    "cumprod",
    "cumsum",
    "top_k",
    couple=_couple_along(lambda equation: [equation.params["axis"]]),
)
register("sort", couple=_couple_along(lambda equation: [equation.params["dimension"]]))
register("fft", couple=_couple_along(_transformed))


# The numbers of places: an array like any other, of which channels are taken.


def _couple_iota(coupling, equation):
    (output,), along = equation.outputs, equation.params["dimension"]
    axes = [coupling.fresh(n) for n in output.shape]
    coupling.fix(axes[along], "numbers its places", equation)
    return [axes]


def _numbers(equation, shape):
    """Return the numbers along their axis, of size one along the others."""
    (output,), along = equation.outputs, equation.params["dimension"]
    sizes = [n if i == along else 1 for i, n in enumerate(shape)]
    return np.arange(output.shape[along], dtype=output.dtype), sizes


def _evaluate_iota(liveness, equation, ins):
    (output,), along = equation.outputs, equation.params["dimension"]
    shape = liveness.shape(output)
    if shape[along] == 1:
        return [liveness.nothing(output)]
    numbers, sizes = _numbers(equation, shape)
    return [certain(np.broadcast_to(numbers.reshape(sizes), shape))]


def _rewrite_iota(rewriter, equation, ins):
    (output,), along = equation.outputs, equation.params["dimension"]
    axis = rewriter.axes(output)[along]
    shape = rewriter.shape(output)
    if axis is None or len(axis) == shape[along]:
        return bind(rewriter, equation, ins, shape=shape)
    numbers, sizes = _numbers(equation, shape)
    kept = numbers[rewriter.kept(axis)].reshape(sizes)
    return [lax.broadcast_in_dim(kept, shape, range(len(shape)))]


register("iota", couple=_couple_iota, evaluate=_evaluate_iota, rewrite=_rewrite_iota)
