"""Which state of an NNX module a call changes."""

from typing import Any

import jax
from flax import nnx
from jax.extend.core import Jaxpr, JaxprEqn, Var
from jax.extend.core.primitives import jit_p, remat_p, scan_p

from sparsejax.masks.layout import named_leaves


def changed_state(module: nnx.Module, inputs: tuple[Any, ...]) -> list[str]:
    """List the leaves of a module's state that a call changes, by path.

    A leaf is unchanged where the traced call returns what it was given, through
    `nnx.jit`, `nnx.remat` and `nnx.scan` too. Nothing is computed.

    Args:
      module: what is called with ``inputs``.
      inputs: trees of arrays or `jax.ShapeDtypeStruct`.
    """
    graphdef, state = nnx.split(module)

    def state_after(state, *inputs):
        module = nnx.merge(graphdef, state)
        module(*inputs)
        return nnx.state(module)

    closed, after = jax.make_jaxpr(state_after, return_shape=True)(state, *inputs)
    origins = dict(zip(named_leaves(after), _origins(closed.jaxpr), strict=True))
    given = enumerate(named_leaves(state))
    return [name for place, name in given if origins.get(name) != place]


def _origins(jaxpr: Jaxpr) -> list[int | None]:
    """Return which input each output is; None where it is computed."""
    origins: dict[Var, int | None] = {x: place for place, x in enumerate(jaxpr.invars)}

    def origin(x: Any) -> int | None:
        return origins.get(x) if isinstance(x, Var) else None

    for equation in jaxpr.eqns:
        if equation.primitive in (jit_p, remat_p, scan_p):
            inner = equation.params["jaxpr"]
            inner = getattr(inner, "jaxpr", inner)  # a remat's is not closed
            for output, place in enumerate(_origins(inner)):
                if place is not None and _returns(equation, output, place):
                    outer = origin(equation.invars[place])
                    origins[equation.outvars[output]] = outer
    return [origin(x) for x in jaxpr.outvars]


def _returns(equation: JaxprEqn, output: int, place: int) -> bool:
    """Return whether an output is the input at ``place`` if it is so inside."""
    if equation.primitive is not scan_p:
        return True
    constants, carries = equation.params["num_consts"], equation.params["num_carry"]
    if output < carries:
        return place == constants + output
    return place >= constants + carries
