"""Sums of products: matrix multiplication in all its forms."""

import math

import numpy as np

from sparsejax.compaction.known import Known
from sparsejax.compaction.rules.registry import register


def _axes(equation):
    """Return (batch, contracted, free) axes of both operands."""
    (left, right), batches = equation.params["dimension_numbers"]
    result = []
    for value, contracted, batch in zip(
        equation.inputs, (left, right), batches, strict=True
    ):
        taken = {*contracted, *batch}
        free = [i for i in range(len(value.shape)) if i not in taken]
        result.append(
            tuple([int(i) for i in group] for group in (batch, contracted, free))
        )
    return result


def _couple(coupling, equation):
    values = equation.inputs
    (batch, contracted, free), (batch2, contracted2, free2) = _axes(equation)
    left, right = coupling.of(values[0]), coupling.of(values[1])
    weights(
        coupling, equation, (contracted, contracted2), (batch + free, batch2 + free2)
    )
    for i, j in zip(contracted, contracted2, strict=True):
        coupling.join(left[i], right[j], equation)
    stacked = [
        coupling.join(left[i], right[j], equation)
        for i, j in zip(batch, batch2, strict=True)
    ]
    return [stacked + [left[i] for i in free] + [right[j] for j in free2]]


def weights(coupling, equation, contracted, free):
    """Note the roles of a contraction's operand that comes from parameters."""
    derived = [coupling.is_derived(value) for value in equation.inputs[:2]]
    for side, value in enumerate(equation.inputs[:2]):
        if not derived[side]:
            continue
        axes = coupling.of(value)
        # Of two factors of one weight the left makes what the right takes.
        role = "producer" if all(derived) and side == 0 else "consumer"
        for i in contracted[side]:
            coupling.play(role, axes[i])
        if not all(derived):
            coupling.use(equation, value)
            for i in free[side]:
                coupling.play("producer", axes[i])


def _evaluate(liveness, equation, ins):
    coupling, (output,) = liveness.coupling, equation.outputs
    groups, values = _axes(equation), equation.inputs
    sides = tuple(map(_folded, ins, groups))
    summed = tuple(coupling.of(values[0])[i] for i in groups[0][1])
    for_channels = [
        max(ins[0].value.shape[i], ins[1].value.shape[j])
        for i, j in zip(groups[0][1], groups[1][1], strict=True)
    ]
    terms, varying = (
        np.broadcast_to(one, math.prod(for_channels)) for one in summands(*sides)
    )
    if len(summed) == 1 and summed[0] is not None:
        for side in (0, 1):
            terms = terms & ~_folded_constants(liveness, equation, sides, side)
    liveness.consume(
        summed, terms.reshape(for_channels), varying.reshape(for_channels), equation
    )
    for side, one in enumerate(sides):
        other = values[1 - side]
        if coupling.is_derived(values[side]) and not coupling.is_derived(other):
            free = groups[side][0] + groups[side][2]
            emitted = one.may.any(1).reshape([ins[side].value.shape[i] for i in free])
            liveness.produce(tuple(coupling.of(values[side])[i] for i in free), emitted)
    left, right = sides
    result = multiply(left, right, _length(equation, groups, ins))
    shape = liveness.shape(output)
    if result.value.size != math.prod(shape):
        return [liveness.nothing(output)]
    value, unknown = (array.reshape(shape) for array in result)
    return [Known(value.astype(output.dtype), unknown)]


def _folded(one, groups):
    """Arrange an operand as [batch, contracted, free]."""
    order = [i for group in groups for i in group]
    sizes = [math.prod(one.value.shape[i] for i in group) for group in groups]
    return Known(*(array.transpose(order).reshape(sizes) for array in one))


def summands(left, right):
    """Return where terms of a sum of products may be nonzero, and may vary.

    Args:
      left: `Known` [b, k, m].
      right: `Known` [b, k, n].

    Returns:
      Two bool arrays [k].
    """
    may = [one.may.any(2) for one in (left, right)]
    unknown = [one.unknown.any(2) for one in (left, right)]
    varying = unknown[0] & may[1] | may[0] & unknown[1]
    return (may[0] & may[1]).any(0), varying.any(0)


def _length(equation, groups, ins):
    """Return over how many equal terms the collapsed axes sum; None for a symbol."""
    pairs = zip(groups[0][1], groups[1][1], strict=True)
    sizes = [
        equation.inputs[0].shape[i]
        for i, j in pairs
        if ins[0].value.shape[i] == ins[1].value.shape[j] == 1
    ]
    integers = all(isinstance(n, int | np.integer) for n in sizes)
    return math.prod(sizes) if integers else None


def multiply(left, right, length):
    """Return what is known of a product, summed over k.

    Args:
      left: `Known` [b, k, m]; sizes of one are stretched.
      right: `Known` [b, k, n]; likewise.
      length: how often all terms are summed, None where that is not known.

    Returns:
      `Known` [b, m, n].
    """
    unknown = _any_product(left.unknown, right.may)
    unknown |= _any_product(left.may, right.unknown)
    value = np.zeros(unknown.shape, np.float32)
    if not unknown.all() and all((one.clean != 0).any() for one in (left, right)):
        terms = _matmul(left.clean, right.clean)
        value = terms * (1 if length is None else length)
        if length is None:
            unknown = unknown | (terms != 0)
    return Known(value, unknown)


def _any_product(left, right):
    """Return bool [b, m, n]: where some k of [b, k, m] and [b, k, n] hold both."""
    if not left.any() or not right.any():
        batch = max(left.shape[0], right.shape[0])
        return np.zeros((batch, left.shape[2], right.shape[2]), bool)
    if left.shape[2] == 1:
        return (left & right).any(1)[:, None]
    return _matmul(left, right) > 0


def _matmul(left, right):
    inner = max(left.shape[1], right.shape[1])
    left, right = (
        np.broadcast_to(one, (one.shape[0], inner, one.shape[2])).astype(np.float32)
        for one in (left, right)
    )
    return np.matmul(left.transpose(0, 2, 1), right)


def _folded_constants(liveness, equation, sides, side):
    """Return bool [contracted]: constants of one side that weights may absorb."""
    activation, weight = sides[side], sides[1 - side]
    values, coupling = equation.inputs, liveness.coupling
    (contracted,) = _axes(equation)[side][1]
    single = activation.value.shape[0] == activation.value.shape[2] == 1
    if coupling.is_derived(values[side]) or not single or weight.value.shape[0] != 1:
        return np.False_
    return liveness.fold(
        equation,
        coupling.of(values[side])[contracted],
        Known(activation.value[0, :, 0], activation.unknown[0, :, 0]),
        Known(weight.value[0], weight.unknown[0]),
    )


register("dot_general", couple=_couple, evaluate=_evaluate)
