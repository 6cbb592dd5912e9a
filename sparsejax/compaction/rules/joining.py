"""Joining, cutting and padding: axes of several parts."""

import functools
import itertools

import numpy as np
from jax import lax

from sparsejax.compaction.axes import Axis
from sparsejax.compaction.known import Known, either
from sparsejax.compaction.rules.registry import bind, register


def _couple_concatenate(coupling, equation):
    coupling.meet(equation)
    along = equation.params["dimension"]
    (output,) = equation.outputs
    parts = [coupling.of(value) for value in equation.inputs]
    result = []
    for index in range(len(output.shape)):
        axes = [part[index] for part in parts]
        if index == along:
            result.append(_concatenated(coupling, equation, axes))
            continue
        axis = axes[0]
        for other in axes[1:]:
            axis = coupling.join(axis, other, equation)
        result.append(axis)
    return [result]


def _concatenated(coupling, equation, axes):
    """Return the axis of several in a row; fixed ones get atoms that stay."""
    if not any(axes):
        return None
    along, atoms, origin = equation.params["dimension"], [], frozenset()
    for axis, value in zip(axes, equation.inputs, strict=True):
        n = value.shape[along]
        if axis is None:
            axis = Axis(coupling.classes.fresh(n))
            coupling.pin(axis, "joins channels to an axis that is none", equation)
        atoms.append(axis.atoms)
        origin |= axis.origin
    return Axis(np.concatenate(atoms), origin)


def _evaluate_concatenate(liveness, equation, ins):
    along, (output,) = equation.params["dimension"], equation.outputs
    shape = liveness.shape(output)
    joined = []
    for pick in (lambda one: one.value, lambda one: one.unknown):
        parts = []
        for one, value in zip(ins, equation.inputs, strict=True):
            fixed = tuple(i for i, n in enumerate(shape) if n == 1 and i != along)
            own = list(shape)
            own[along] = value.shape[along] if shape[along] > 1 else 1
            one = one.collapse(fixed if shape[along] > 1 else (*fixed, along))
            parts.append(np.broadcast_to(pick(one), own))
        joined.append(np.concatenate(parts, axis=along))
    return [Known(*joined)]


register("concatenate", couple=_couple_concatenate, evaluate=_evaluate_concatenate)


def _couple_stack(coupling, equation):
    coupling.meet(equation)
    along = equation.params["axis"]
    axes = list(coupling.of(equation.inputs[0]))
    for value in equation.inputs[1:]:
        both = zip(axes, coupling.of(value), strict=True)
        axes = [coupling.join(*pair, equation) for pair in both]
    return [[*axes[:along], None, *axes[along:]]]


def _evaluate_stack(liveness, equation, ins):
    along, shape = equation.params["axis"], liveness.shape(equation.outputs[0])
    fixed = tuple(i for i, n in enumerate(shape) if n == 1)
    parts = [
        Known(*(np.expand_dims(array, along) for array in one)).collapse(fixed)
        for one in ins
    ]
    return [functools.reduce(either, parts)]


register("stack", couple=_couple_stack, evaluate=_evaluate_stack)


def _couple_unstack(coupling, equation):
    axes = list(coupling.of(equation.inputs[0]))
    coupling.pin(axes.pop(equation.params["axis"]), "takes single channels", equation)
    return [axes for _ in equation.outputs]


register("unstack", couple=_couple_unstack)


def _couple_tile(coupling, equation):
    repeats = equation.params["reps"]
    axes = zip(coupling.of(equation.inputs[0]), repeats, strict=True)
    return [
        [axis and Axis(np.tile(axis.atoms, n), axis.origin) for axis, n in axes],
    ]


def _evaluate_tile(liveness, equation, ins):
    (one,), repeats = ins, equation.params["reps"]
    wanted = [1 if m == 1 else n for m, n in zip(one.value.shape, repeats, strict=True)]
    return [Known(*(np.tile(array, wanted) for array in one))]


register("tile", couple=_couple_tile, evaluate=_evaluate_tile)


def _pieces(equation):
    """Yield where each output of a split begins and ends."""
    ends = list(itertools.accumulate(int(n) for n in equation.params["sizes"]))
    return zip([0, *ends], ends, strict=False)


def _couple_split(coupling, equation):
    along, axes = equation.params["axis"], coupling.of(equation.inputs[0])
    results = []
    for start, stop in _pieces(equation):
        cut = axes[along] and _narrowed(
            coupling, axes[along], slice(start, stop), equation
        )
        results.append([*axes[:along], cut, *axes[along + 1 :]])
    return results


def _narrowed(coupling, axis, indices, equation):
    """Return some of an axis; a single index is an axis of size one, which is fixed."""
    cut = axis.take(indices)
    if len(cut) > 1:
        return cut
    coupling.pin(cut, "takes a single channel", equation)
    return None


def _evaluate_split(liveness, equation, ins):
    along, (one,) = equation.params["axis"], ins
    if one.value.shape[along] == 1:
        return [one for _ in equation.outputs]
    cut = lambda array, start, stop: array[
        (slice(None),) * along + (slice(start, stop),)
    ]
    return [
        Known(cut(one.value, *ends), cut(one.unknown, *ends))
        for ends in _pieces(equation)
    ]


def _rewrite_split(rewriter, equation, ins):
    along = equation.params["axis"]
    sizes = [rewriter.shape(value)[along] for value in equation.outputs]
    return bind(rewriter, equation, ins, sizes=tuple(sizes))


register(
    "split", couple=_couple_split, evaluate=_evaluate_split, rewrite=_rewrite_split
)


def _slices(equation):
    params, rank = equation.params, len(equation.inputs[0].shape)
    strides = params["strides"] or (1,) * rank
    ends = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return [slice(*one) for one in ends]


def _couple_slice(coupling, equation):
    axes = zip(coupling.of(equation.inputs[0]), _slices(equation), strict=True)
    return [
        [axis and _narrowed(coupling, axis, cut, equation) for axis, cut in axes],
    ]


def _evaluate_slice(liveness, equation, ins):
    (one,) = ins
    cuts = zip(one.value.shape, _slices(equation), strict=True)
    cut = tuple(slice(None) if n == 1 else cut for n, cut in cuts)
    return [Known(one.value[cut], one.unknown[cut])]


def _rewrite_slice(rewriter, equation, ins):
    (array,) = ins
    axes = rewriter.axes(equation.inputs[0])
    for index, (axis, cut) in enumerate(zip(axes, _slices(equation), strict=True)):
        if axis is None:
            array = lax.slice_in_dim(array, cut.start, cut.stop, cut.step, index)
            continue
        kept = rewriter.kept(axis)
        chosen = np.isin(kept, np.arange(len(axis))[cut])
        if not chosen.all():
            array = array.take(np.flatnonzero(chosen), axis=index)
    return [array]


register(
    "slice", couple=_couple_slice, evaluate=_evaluate_slice, rewrite=_rewrite_slice
)


def _couple_pad(coupling, equation):
    result = []
    config = equation.params["padding_config"]
    for axis, padding in zip(coupling.of(equation.inputs[0]), config, strict=True):
        low, high, interior = padding
        if axis is None or (low, high, interior) == (0, 0, 0):
            result.append(axis)
        elif min(low, high) < 0 or interior:
            coupling.pin(axis, "crops or spreads channels", equation)
            result.append(None)
        else:
            new = coupling.classes.fresh(low + high)
            atoms = np.concatenate([new[:low], axis.atoms, new[low:]])
            result.append(Axis(atoms, axis.origin))
    return [result]


def _evaluate_pad(liveness, equation, ins):
    one, filling = ins
    axes = liveness.coupling.of(equation.outputs[0])
    config = equation.params["padding_config"]
    mixed = tuple(  # fixed axes: all entries, and the filling, count as one
        i for i, axis in enumerate(axes) if axis is None and config[i] != (0, 0, 0)
    )
    one = one.collapse(mixed)
    if mixed and not liveness.interior:
        differs = (one.value != filling.value) | filling.unknown
        one = Known(one.value, one.unknown | differs)
    widths = [
        (0, 0) if axis is None else padding[:2]
        for axis, padding in zip(axes, config, strict=True)
    ]
    value = np.pad(one.value, widths, constant_values=filling.value)
    return [Known(value, np.pad(one.unknown, widths, constant_values=filling.unknown))]


def _rewrite_pad(rewriter, equation, ins):
    config = list(equation.params["padding_config"])
    before, after = equation.inputs[0], equation.outputs[0]
    for index, axis in enumerate(rewriter.axes(after)):
        low, high, _ = config[index]
        if axis is not None and (low or high):
            kept = rewriter.kept(axis)
            end = low + before.shape[index]
            config[index] = int((kept < low).sum()), int((kept >= end).sum()), 0
    return bind(rewriter, equation, ins, padding_config=tuple(config))


register("pad", couple=_couple_pad, evaluate=_evaluate_pad, rewrite=_rewrite_pad)
