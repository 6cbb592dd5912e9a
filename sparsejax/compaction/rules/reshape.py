"""Reshaping: groups of axes that become groups of axes, with products in between."""

import itertools
import math
import operator

import numpy as np

from sparsejax.compaction.axes import Axis
from sparsejax.compaction.known import Known
from sparsejax.compaction.rules.registry import bind, register


def factor_groups(before, after):
    """Split two shapes of one size into the shortest runs of equal size.

    Axes of size one are left out. Returns pairs of lists of axes.
    """
    rows = [i for i, n in enumerate(before) if not _is(n, 1)]
    columns = [i for i, n in enumerate(after) if not _is(n, 1)]
    left = list(
        itertools.accumulate((before[i] for i in rows), operator.mul, initial=1)
    )
    right = list(
        itertools.accumulate((after[i] for i in columns), operator.mul, initial=1)
    )
    cuts = [(i, j) for i, m in enumerate(left) for j, n in enumerate(right) if m == n]
    return [(rows[i:k], columns[j:m]) for (i, j), (k, m) in itertools.pairwise(cuts)]


def _is(n, number):
    return isinstance(n, int | np.integer) and n == number


def _couple_reshape(coupling, equation):
    source, (output,) = equation.inputs[0], equation.outputs
    axes = coupling.of(source)
    result: list[Axis | None] = [None] * len(output.shape)
    if equation.params.get("dimensions") is not None or 0 in output.shape:
        for axis in axes:
            coupling.pin(axis, "reorders or is empty", equation)
        return [result]
    for before, after in factor_groups(source.shape, output.shape):
        labelled = [i for i in before if axes[i] is not None]
        if not labelled:
            continue
        if len(before) == len(after) == 1:
            result[after[0]] = axes[before[0]]
            continue
        sizes = [source.shape[i] for i in before], [output.shape[i] for i in after]
        if not all(isinstance(n, int | np.integer) for n in sum(sizes, [])):
            for i in labelled:
                coupling.pin(axes[i], "mixes channels with a symbolic axis", equation)
            continue
        merged = _merge(coupling, [axes[i] for i in before], sizes[0])
        for i, axis in zip(after, _split(coupling, merged, sizes[1]), strict=True):
            result[i] = axis
    return [result]


def _merge(coupling, axes, sizes):
    """Return the axis of all combinations of some axes' indices."""
    indices = np.unravel_index(np.arange(math.prod(sizes)), sizes)
    labelled = [(axis, i) for axis, i in zip(axes, indices, strict=True) if axis]
    origin = frozenset().union(*(axis.origin for axis, _ in labelled))
    columns = [axis.atoms[i] for axis, i in labelled]
    return Axis(coupling.classes.products(columns), origin)


def _split(coupling, axis, sizes):
    """Return the axes whose combinations of indices are an axis's indices."""
    if len(sizes) == 1:
        return [axis]
    indices = np.unravel_index(np.arange(math.prod(sizes)), sizes)
    parts = [coupling.fresh(n, axis.origin) for n in sizes]
    columns = [part.atoms[i] for part, i in zip(parts, indices, strict=True)]
    coupling.classes.unite(axis.atoms, coupling.classes.products(columns))
    return parts


def _evaluate_reshape(liveness, equation, ins):
    source, (output,), (one,) = equation.inputs[0], equation.outputs, ins
    if 0 in output.shape:
        return [liveness.nothing(output)]
    shape = liveness.shape(output)
    # A fixed axis that merges with one of channels stands for all its indices; channels
    # that end in a fixed axis count as one.
    wide = [1] * len(source.shape)
    for before, after in factor_groups(source.shape, output.shape):
        if any(shape[j] > 1 for j in after):
            for i in before:
                wide[i] = source.shape[i]
    one = one.collapse(tuple(i for i, n in enumerate(wide) if n == 1))
    return [Known(*(np.broadcast_to(array, wide).reshape(shape) for array in one))]


def _rewrite_reshape(rewriter, equation, ins):
    return bind(rewriter, equation, ins, new_sizes=rewriter.shape(equation.outputs[0]))


register(
    "reshape",
    couple=_couple_reshape,
    evaluate=_evaluate_reshape,
    rewrite=_rewrite_reshape,
)
