"""Convolution, with groups of features and of the batch."""

import jax.numpy as jnp
import numpy as np

from sparsejax.compaction.known import Known
from sparsejax.compaction.rules.contraction import multiply, summands, weights
from sparsejax.compaction.rules.registry import bind, register


def _axes(equation):
    """Return (batch, features, space) of the input, (out, in, space) of the kernel."""
    numbers = equation.params["dimension_numbers"]
    split = lambda spec: (spec[0], spec[1], list(spec[2:]))
    return split(numbers.lhs_spec), split(numbers.rhs_spec)


def _couple(coupling, equation):
    source, kernel = equation.inputs
    (batch, features, space), (out, into, window) = _axes(equation)
    axes, weight = coupling.of(source), coupling.of(kernel)
    weights(coupling, equation, ([features], [into]), ([batch], [out]))
    for axis in [axes[i] for i in space] + [weight[i] for i in window]:
        coupling.pin(axis, "slides over an axis", equation)
    groups = equation.params["feature_group_count"]
    if groups > 1:
        outputs = _couple_groups(coupling, equation, groups)
    else:
        coupling.join(axes[features], weight[into], equation)
        outputs = _outputs(coupling, equation)
    return [_arranged(equation, axes[batch], outputs)]


def _arranged(equation, batch, outputs):
    spec = equation.params["dimension_numbers"].out_spec
    result = [None] * len(spec)
    result[spec[0]], result[spec[1]] = batch, outputs
    return result


def _outputs(coupling, equation):
    """Return the output's features; groups of the batch keep equal shares of them."""
    (batch, _, _), (out, _, _) = _axes(equation)
    axis, groups = coupling.of(equation.inputs[1])[out], equation.params
    if groups["batch_group_count"] == 1 or axis is None:
        return axis
    coupling.pin(coupling.of(equation.inputs[0])[batch], "groups the batch", equation)
    parts = _blocks(coupling, axis, groups["batch_group_count"])
    coupling.pin(parts[0], "groups the batch", equation)
    return axis


def _blocks(coupling, axis, groups):
    """Tie an axis to the product of (group, place in it), and return these two."""
    size = len(axis) // groups
    parts = coupling.fresh(groups), coupling.fresh(size)
    numbers = np.divmod(np.arange(len(axis)), size)
    columns = [
        part.atoms[i]
        for part, i in zip(parts, numbers, strict=True)
        if part is not None
    ]
    coupling.classes.unite(axis.atoms, coupling.classes.products(columns))
    return parts


def _couple_groups(coupling, equation, groups):
    """Tie input and output features to groups; a group goes as a whole."""
    source, kernel = equation.inputs
    (_, features, _), (out, into, _) = _axes(equation)
    axis, weight = coupling.of(source)[features], coupling.of(kernel)
    if axis is None or weight[out] is None:
        for one in (axis, weight[into], weight[out]):
            coupling.pin(one, "groups an axis that is not one of channels", equation)
        return None
    group, place = _blocks(coupling, axis, groups)
    if place is not None:
        coupling.join(place, weight[into], equation)
    group_out, _ = _blocks(coupling, weight[out], groups)
    coupling.join(group, group_out, equation)
    if equation in coupling.uses:
        coupling.groups_of[coupling.uses[equation][0]] = group.atoms
    return weight[out]


def _evaluate(liveness, equation, ins):
    coupling, params = liveness.coupling, equation.params
    source, kernel = equation.inputs
    (_, features, space), (out, into, window) = _axes(equation)
    groups = params["feature_group_count"]
    axis, outputs = coupling.of(source)[features], coupling.of(kernel)[out]
    if axis is None and groups > 1:
        return [liveness.nothing(equation.outputs[0])]
    others = tuple(i for i in range(len(source.shape)) if i != features)
    here = ins[0].collapse(others)
    channels = Known(*(array.reshape(groups, -1, 1) for array in here))
    maps = _matrix(ins[1], out, into, window, groups)
    terms, varying = summands(channels, maps)
    exact = not any(low or high for low, high in params["padding"]) and all(
        step == 1 for step in params["lhs_dilation"]
    )
    if axis is not None and groups == 1 and not coupling.is_derived(source):
        channel = Known(channels.value[0, :, 0], channels.unknown[0, :, 0])
        matrix = Known(maps.value[0], maps.unknown[0])
        terms = terms & ~liveness.fold(equation, axis, channel, matrix, exact)
    # A group goes with its inputs and its outputs; only places in a group are summed.
    summed = coupling.of(kernel)[into] if groups > 1 else axis
    liveness.consume((summed,), terms, varying, equation)
    if coupling.is_derived(kernel) and not coupling.is_derived(source):
        liveness.produce((outputs,), maps.may.any(1).reshape(-1))
    if (
        not exact and not liveness.interior
    ):  # a constant meets fewer weights at the border
        channels = Known(channels.value, channels.may)
    shape = liveness.shape(equation.outputs[0])
    both_fixed = channels.value.shape[1] == maps.value.shape[1] == 1
    result = multiply(channels, maps, kernel.shape[into] if both_fixed else 1)
    if result.value.size != np.prod(shape):
        return [liveness.nothing(equation.outputs[0])]
    return [Known(*(array.reshape(shape) for array in result))]


def _matrix(kernel, out, into, window, groups):
    """Return what is known of a kernel, summed over its window, as [group, in, out].

    Output features are those of a group.
    """
    space, order = tuple(window), (0, 1) if into < out else (1, 0)
    arrange = lambda array: (
        array.transpose(order).reshape(array.shape[order[0]], groups, -1).swapaxes(0, 1)
    )
    total = kernel.clean.sum(space, dtype=np.float32)
    # A sum may be zero by chance where weights are not.
    total[kernel.may.any(space) & (total == 0)] = np.finfo(np.float32).tiny
    return Known(arrange(total), arrange(kernel.unknown.any(space)))


def _rewrite(rewriter, equation, ins):
    if 0 in ins[0].shape or 0 in ins[1].shape:
        output = equation.outputs[0]
        return [jnp.zeros(rewriter.shape(output), output.dtype)]
    groups = equation.params["feature_group_count"]
    if groups > 1:
        (_, features, _), (_, into, _) = _axes(equation)
        groups = ins[0].shape[features] // ins[1].shape[into]
    return bind(rewriter, equation, ins, feature_group_count=groups)


register("conv_general_dilated", couple=_couple, evaluate=_evaluate, rewrite=_rewrite)
