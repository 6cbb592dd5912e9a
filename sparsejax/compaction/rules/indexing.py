"""Entries chosen by index while the program runs: channels that are whole pass."""

import numpy as np

from sparsejax.compaction.known import Known
from sparsejax.compaction.rules.registry import bind, register


def _whole(coupling, equation, axis, size, full):
    """Return the axis where all of it is taken; else keep its channels."""
    if axis is not None and size != full:
        coupling.pin(axis, "takes channels by index", equation)
        return None
    return axis


def _couple_dynamic_slice(coupling, equation):
    source, sizes = equation.inputs[0], equation.params["slice_sizes"]
    both = zip(coupling.of(source), sizes, source.shape, strict=True)
    return [[_whole(coupling, equation, *one) for one in both]]


def _evaluate_same(liveness, equation, ins):
    """Know of a part what is known of the whole."""
    shape = liveness.shape(equation.outputs[0])
    fixed = tuple(i for i, n in enumerate(shape) if n == 1)
    return [ins[0].collapse(fixed)]


def _rewrite_dynamic_slice(rewriter, equation, ins):
    sizes = rewriter.shape(equation.outputs[0])
    return bind(rewriter, equation, ins, slice_sizes=sizes)


register(
    "dynamic_slice",
    couple=_couple_dynamic_slice,
    evaluate=_evaluate_same,
    rewrite=_rewrite_dynamic_slice,
)


def _couple_dynamic_update_slice(coupling, equation):
    coupling.meet(equation)
    source, update = equation.inputs[:2]
    result = []
    for i, axes in enumerate(
        zip(coupling.of(source), coupling.of(update), strict=True)
    ):
        if source.shape[i] == update.shape[i]:
            result.append(coupling.join(*axes, equation))
            continue
        for axis in axes:
            coupling.pin(axis, "writes channels by index", equation)
        result.append(None)
    return [result]


def _evaluate_dynamic_update_slice(liveness, equation, ins):
    shape = liveness.shape(equation.outputs[0])
    fixed = tuple(i for i, n in enumerate(shape) if n == 1)
    one, update = (operand.collapse(fixed) for operand in ins[:2])
    differs = (one.value != update.value) | one.unknown | update.unknown
    return [Known(one.value, differs)]


register(
    "dynamic_update_slice",
    couple=_couple_dynamic_update_slice,
    evaluate=_evaluate_dynamic_update_slice,
)


def _passing(equation):
    """Yield (operand axis, output axis) of what a gather takes whole."""
    numbers, source = equation.params["dimension_numbers"], equation.inputs[0]
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    kept = [
        i
        for i in range(len(source.shape))
        if i not in (*numbers.collapsed_slice_dims, *batching)
    ]
    for i, output in zip(kept, numbers.offset_dims, strict=True):
        whole = equation.params["slice_sizes"][i] == source.shape[i]
        if whole and i not in numbers.start_index_map:
            yield i, output


def _couple_gather(coupling, equation):
    table, indices = equation.inputs[:2]
    axes, passing = coupling.of(table), dict(_passing(equation))
    result = [None] * len(equation.outputs[0].shape)
    for i, axis in enumerate(axes):
        if i in passing:
            result[passing[i]] = axis
            coupling.play("producer", axis)
        else:
            coupling.pin(axis, "takes entries by index", equation)
    for axis in coupling.of(indices):
        coupling.pin(axis, "takes entries by index", equation)
    return [result]


def _evaluate_gather(liveness, equation, ins):
    coupling, table, (output,) = liveness.coupling, equation.inputs[0], equation.outputs
    passing = dict(_passing(equation))
    rest = tuple(i for i in range(len(table.shape)) if i not in passing)
    one = ins[0].collapse(rest)
    shape = liveness.shape(output)
    # Out of bounds a gather may fill with zeros or NaN: only zeros stay what they are.
    order = sorted(passing, key=lambda i: passing[i])
    arrays = [
        array.transpose([*rest, *order]).reshape(
            [shape[i] if i in passing.values() else 1 for i in range(len(shape))]
        )
        for array in one
    ]
    if coupling.is_derived(table):
        emitted = Known(*arrays).may
        liveness.produce(tuple(coupling.of(output)), np.broadcast_to(emitted, shape))
    return [Known(arrays[0], Known(*arrays).may)]


def _rewrite_gather(rewriter, equation, ins):
    sizes = list(equation.params["slice_sizes"])
    for i, output in _passing(equation):
        sizes[i] = rewriter.shape(equation.outputs[0])[output]
    return bind(rewriter, equation, ins, slice_sizes=tuple(sizes))


register(
    "gather",
    couple=_couple_gather,
    evaluate=_evaluate_gather,
    rewrite=_rewrite_gather,
)
