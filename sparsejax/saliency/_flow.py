"""What a network carries from its input to its output, whatever its magnitude.

`flow` runs the equations of a network's jaxpr without what is added independently of
the input, as biases, shifts and means of norms are, and without the bound of ReLU6.
What is left of ReLUs, convolutions, matrix products, sums, pooling and norms with fixed
statistics is positively homogeneous, and with weights that are not negative all of it
reaches the output.

In a deep network the sum of all paths leaves the range of float32. Where all paths meet
in one array, as between residual blocks, that array is divided by a constant. Every
path crosses it once, so that all derivatives shrink by one factor, a power of two, and
their order stays what it was. Inside a block nothing is divided.

Functions with derivatives of their own are called like any other: ReLU's differs at 0
alone, where all that enters is 0, and so is every score that it could change.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from sparsejax._calls import CALLS, opened


def flow(
    apply: Callable[[Any, jax.Array], Any], params: Any, x: jax.Array
) -> jax.Array:
    """Return the sum of what reaches the outputs from ``x``, divided by a constant.

    The constant is a power of two, and no derivative is taken of it.

    Args:
      apply: ``(params, x) -> outputs``, any tree. Arrays that it closes over, as the
        variances of a norm, count as `unsigned` makes them; scalars as they are.
      params: tree of arrays, taken as they are.
      x: the input.
    """
    program = jax.make_jaxpr(apply)(params, x)
    inputs = jax.tree.leaves((params, x))
    carries = [False] * (len(inputs) - 1) + [True]
    outputs, carried = _run(program, inputs, carries, alone=True)
    reached = [y for y, own in zip(outputs, carried, strict=True) if own]
    return sum((jnp.sum(y, dtype=jnp.float32) for y in reached), jnp.zeros(()))


def unsigned(array: jax.Array) -> jax.Array:
    """Return absolute values of floats, and ones for a vector or a scalar."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return jnp.ones_like(array) if array.ndim < 2 else jnp.abs(array)


def _run(
    program: ClosedJaxpr | Jaxpr,
    inputs: Sequence[Any],
    carries: Sequence[bool],
    *,
    alone: bool,
) -> tuple[list[Any], list[bool]]:
    """Run a jaxpr; return its outputs, and which of them carry the network's input.

    Args:
      program: the jaxpr.
      inputs: its arguments.
      carries: which of them carry the network's input.
      alone: whether nothing that does is still to be read outside.
    """
    jaxpr, consts = opened(program)
    values = dict(zip(jaxpr.invars, inputs, strict=True))
    # A scalar is a number of the program, as the 0 of a ReLU, and no parameter.
    consts = [unsigned(const) if const.ndim else const for const in consts]
    values.update(zip(jaxpr.constvars, consts, strict=True))
    carrying = {v for v, own in zip(jaxpr.invars, carries, strict=True) if own}
    last_read = {}
    for now, atoms in enumerate([*(eqn.invars for eqn in jaxpr.eqns), jaxpr.outvars]):
        last_read |= {v: now for v in atoms if not isinstance(v, Literal)}

    def read(atoms):
        literal = lambda atom: isinstance(atom, Literal)
        arrays = [atom.val if literal(atom) else values[atom] for atom in atoms]
        return arrays, [not literal(atom) and atom in carrying for atom in atoms]

    for now, eqn in enumerate(jaxpr.eqns):
        still_read = lambda variables, now=now: [
            v for v in variables if last_read.get(v, -1) > now
        ]
        others = still_read(carrying)
        alone_here = alone and not others
        results, carried = _equation(eqn, *read(eqn.invars), alone=alone_here)
        values.update(zip(eqn.outvars, results, strict=True))
        pairs = zip(eqn.outvars, carried, strict=True)
        new = still_read(v for v, own in pairs if own)
        carrying = {*others, *new}
        if alone_here and len(new) == 1:
            values[new[0]] = _normalized(values[new[0]])
    return read(jaxpr.outvars)


def _equation(
    eqn: JaxprEqn, operands: list[Any], carries: list[bool], *, alone: bool
) -> tuple[list[Any], list[bool]]:
    """Run one equation; arguments and results as those of `_run`."""
    name = eqn.primitive.name
    if name in CALLS:
        return _run(eqn.params[CALLS[name]], operands, carries, alone=alone)
    if name == "scan":
        return _scan(eqn, operands, carries, alone=alone)
    alike = name in ("add", "add_any", "min") and carries.count(True) == 1
    if alike or (name == "sub" and carries == [True, False]):
        carrier = operands[carries.index(True)]
        shape = jnp.broadcast_shapes(*map(jnp.shape, operands))
        return [jnp.broadcast_to(carrier, shape)], [True]
    results = eqn.primitive.bind(*operands, **eqn.params)
    results = results if eqn.primitive.multiple_results else [results]
    return results, [any(carries)] * len(results)


def _scan(
    eqn: JaxprEqn, operands: list[Any], carries: list[bool], *, alone: bool
) -> tuple[list[Any], list[bool]]:
    """Run a scan as the loop that it stands for, so that layers are told apart."""
    body, first, n_state = (eqn.params[k] for k in ("jaxpr", "num_consts", "num_carry"))
    split = lambda x: (x[:first], x[first : first + n_state], x[first + n_state :])
    (consts, state, xs), (of_consts, of_state, of_xs) = split(operands), split(carries)
    alone = alone and not any(of_consts + of_xs)
    turns = range(eqn.params["length"])
    rows, of_rows = {}, [False] * (len(eqn.outvars) - n_state)
    for turn in reversed(turns) if eqn.params["reverse"] else turns:
        inputs = [*consts, *state, *(x[turn] for x in xs)]
        flags = [*of_consts, *of_state, *of_xs]
        results, carried = _run(body, inputs, flags, alone=alone and not any(of_rows))
        state, of_state = results[:n_state], carried[:n_state]
        rows[turn] = results[n_state:]
        of_rows = [a or b for a, b in zip(of_rows, carried[n_state:], strict=True)]
    columns = zip(*(rows[turn] for turn in turns), strict=True)
    return [*state, *map(jnp.stack, columns)], [*of_state, *of_rows]


def _normalized(x: jax.Array) -> jax.Array:
    """Divide by the power of two next to the largest element, a constant."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    largest = jnp.max(jnp.abs(lax.stop_gradient(x)))
    power = lax.reduce_precision(largest, jnp.finfo(x.dtype).nexp, 0)
    return x / jnp.where(power > 0, power, jnp.ones_like(power))
