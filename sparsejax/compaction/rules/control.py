"""Loops and branches: their bodies are labelled, evaluated and rewritten in turn."""

import numpy as np
from jax import lax

from sparsejax.compaction.known import Known, either
from sparsejax.compaction.rules.registry import register


def _enter(coupling, body, axes, derived):
    """Give a body's inputs their axes and label the body."""
    for value, own, is_derived in zip(body.inputs, axes, derived, strict=True):
        coupling.axes[value] = own
        coupling.mark_derived(value, is_derived)
    coupling.run(body)
    return [coupling.of(value) or [None] * len(value.shape) for value in body.outputs]


def _settle(coupling, equation, body, fixed, carry, moving, derived):
    """Label a loop's body until its carry comes out with the axes it went in with.

    An axis that is fixed on one side becomes fixed on the other, and the body is
    labelled anew.
    """
    while True:
        axes = [*fixed, *carry, *moving]
        flags = [*derived[: len(fixed)], *[False] * len(carry), *derived[len(fixed) :]]
        outputs = _enter(coupling, body, axes, flags)
        joined = [
            [coupling.join(a, b, equation) for a, b in zip(before, after, strict=True)]
            for before, after in zip(carry, outputs, strict=False)
        ]
        same = all(
            (a is None) == (b is None)
            for before, after in zip(carry, joined, strict=True)
            for a, b in zip(before, after, strict=True)
        )
        carry = joined
        if same:
            return carry, outputs[len(carry) :]


# Scan.


def _parts(equation, values):
    """Split a scan's inputs into constants, carry and what is scanned over."""
    constants, carried = equation.params["num_consts"], equation.params["num_carry"]
    ends = constants, constants + carried
    return values[: ends[0]], values[ends[0] : ends[1]], values[ends[1] :]


def _couple_scan(coupling, equation):
    constants, carry, scanned = _parts(equation, equation.inputs)
    for value in scanned:
        coupling.pin(coupling.of(value)[0], "scans over an axis", equation)
    carry, stacked = _settle(
        coupling,
        equation,
        equation.bodies[0],
        [_axes(coupling, value) for value in constants],
        [_axes(coupling, value) for value in carry],
        [_axes(coupling, value)[1:] for value in scanned],
        [coupling.is_derived(value) for value in (*constants, *scanned)],
    )
    return carry + [[None, *axes] for axes in stacked]


def _axes(coupling, value):
    return coupling.of(value) or [None] * len(value.shape)


def _evaluate_scan(liveness, equation, ins):
    body, params = equation.bodies[0], equation.params
    constants, carry, scanned = _parts(equation, ins)
    carry = [
        _carried(liveness, v, k) for v, k in zip(_inner(equation), carry, strict=True)
    ]
    lengths = [one.value.shape[0] for one in scanned if one.value.shape[0] > 1]
    steps = range(max(lengths, default=1))
    stacked = None
    for step in reversed(steps) if params["reverse"] else steps:
        slices = [_entry(one, step) for one in scanned]
        # Without layers of their own all steps are alike: those that change the carry
        # make it less known, until it is the same before and after any step.
        carry, outputs = _step(liveness, body, constants, carry, slices, not lengths)
        stacked = outputs if stacked is None else _joined(stacked, outputs)
    return carry + [Known(one.value[None], one.unknown[None]) for one in stacked or ()]


def _inner(equation):
    return _parts(equation, equation.bodies[0].inputs)[1]


def _carried(liveness, value, one):
    """Return what is known of a carry in the axes that the body gives it."""
    shape = liveness.shape(value)
    return one.collapse(tuple(i for i, n in enumerate(shape) if n == 1))


def _entry(one, step):
    index = step if one.value.shape[0] > 1 else 0
    return Known(one.value[index], one.unknown[index])


def _step(liveness, body, constants, carry, scanned, repeat):
    outer, liveness.in_body = liveness.in_body, True
    while True:
        inputs = [*constants, *carry, *scanned]
        for value, one in zip(body.inputs, inputs, strict=True):
            liveness.set(value, one)
        liveness.run(body)
        results = [liveness.get(value) for value in body.outputs]
        after = results[: len(carry)]
        if repeat:
            after = _joined(carry, after)
            if not all(_same(*pair) for pair in zip(carry, after, strict=True)):
                carry = after
                continue
        liveness.in_body = outer
        return after, results[len(carry) :]


def _joined(before, after):
    """Know of either what is known of both and equal."""
    return [either(a, b) for a, b in zip(before, after, strict=True)]


def _same(a, b):
    return np.array_equal(a.unknown, b.unknown)


def _rewrite_scan(rewriter, equation, ins):
    body, params = equation.bodies[0], equation.params
    constants, carry, scanned = _parts(equation, ins)

    def step(carry, entries):
        outputs = rewriter.run(body, [*constants, *carry, *entries])
        return outputs[: len(carry)], outputs[len(carry) :]

    carry, stacked = lax.scan(
        step,
        carry,
        scanned,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *stacked]


register("scan", couple=_couple_scan, evaluate=_evaluate_scan, rewrite=_rewrite_scan)


# While.


def _while_parts(equation, values):
    """Split a loop's inputs: constants of the condition, of the body, and the carry."""
    first = equation.params["cond_nconsts"]
    second = first + equation.params["body_nconsts"]
    return values[:first], values[first:second], values[second:]


def _couple_while(coupling, equation):
    condition, body = equation.bodies
    of_condition, of_body, carry = _while_parts(equation, equation.inputs)
    derived = [coupling.is_derived(value) for value in of_body]
    axes = [_axes(coupling, value) for value in of_body]
    carry, _ = _settle(
        coupling,
        equation,
        body,
        axes,
        [_axes(coupling, value) for value in carry],
        [],
        derived,
    )
    own = [_axes(coupling, value) for value in of_condition]
    flags = [coupling.is_derived(value) for value in of_condition]
    _enter(coupling, condition, own + carry, flags + [False] * len(carry))
    return [carry][0]


def _evaluate_while(liveness, equation, ins):
    condition, body = equation.bodies
    of_condition, of_body, carry = _while_parts(equation, ins)
    inner = body.inputs[len(of_body) :]
    carry = [_carried(liveness, v, k) for v, k in zip(inner, carry, strict=True)]
    carry, _ = _step(liveness, body, of_body, carry, [], True)
    _step(liveness, condition, [*of_condition, *carry], [], [], False)
    return carry


def _rewrite_while(rewriter, equation, ins):
    condition, body = equation.bodies
    of_condition, of_body, carry = _while_parts(equation, ins)
    return lax.while_loop(
        lambda carry: rewriter.run(condition, [*of_condition, *carry])[0],
        lambda carry: rewriter.run(body, [*of_body, *carry]),
        carry,
    )


register(
    "while", couple=_couple_while, evaluate=_evaluate_while, rewrite=_rewrite_while
)


# Branches.


def _couple_cond(coupling, equation):
    operands = equation.inputs[1:]
    axes = [_axes(coupling, value) for value in operands]
    derived = [coupling.is_derived(value) for value in operands]
    results = [_enter(coupling, body, axes, derived) for body in equation.bodies]
    joined = results[0]
    for other in results[1:]:
        joined = [
            [coupling.join(a, b, equation) for a, b in zip(one, two, strict=True)]
            for one, two in zip(joined, other, strict=True)
        ]
    return joined


def _evaluate_cond(liveness, equation, ins):
    results = [
        _step(liveness, body, ins[1:], [], [], False)[1] for body in equation.bodies
    ]
    fixed = [
        tuple(i for i, n in enumerate(liveness.shape(value)) if n == 1)
        for value in equation.outputs
    ]
    results = [
        [one.collapse(axes) for one, axes in zip(result, fixed, strict=True)]
        for result in results
    ]
    joined = results[0]
    for other in results[1:]:
        joined = _joined(joined, other)
    return joined


def _rewrite_cond(rewriter, equation, ins):
    branches = [
        lambda *operands, body=body: rewriter.run(body, list(operands))
        for body in equation.bodies
    ]
    return lax.switch(ins[0], branches, *ins[1:])


register("cond", couple=_couple_cond, evaluate=_evaluate_cond, rewrite=_rewrite_cond)
