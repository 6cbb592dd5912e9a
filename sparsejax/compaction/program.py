"""A JAX function as a flat list of equations.

Calls (jit, remat, functions with custom derivatives) are inlined; loops and branches
keep their bodies, flattened in turn.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

from sparsejax._calls import CALLS, opened, source_line
from sparsejax.masks.layout import path_name

# Primitives with bodies of their own, and the parameters that hold them.
_BODIES = {
    "scan": ("jaxpr",),
    "while": ("cond_jaxpr", "body_jaxpr"),
    "cond": ("branches",),
}


@dataclasses.dataclass(eq=False)
class Value:
    """An array that flows through a program."""

    shape: tuple[Any, ...]
    dtype: Any


@dataclasses.dataclass(eq=False)
class Literal(Value):
    """A scalar written into the program."""

    value: Any


@dataclasses.dataclass(eq=False)
class Equation:
    """One primitive applied to values."""

    primitive: core.Primitive
    inputs: list[Value]
    outputs: list[Value]
    params: dict[str, Any]
    source: str
    bodies: tuple["Program", ...] = ()

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.primitive.name

    def __str__(self) -> str:
        return f"primitive '{self.name}' ({self.source})"


@dataclasses.dataclass(eq=False)
class Program:
    """Equations between inputs and outputs.

    Attributes:
      inputs: the values a caller gives.
      constants: arrays that the function closed over.
      equations: in the order in which they run.
      outputs: the values that a caller gets.
    """

    inputs: list[Value]
    constants: dict[Value, Any]
    equations: list[Equation]
    outputs: list[Value]

    def walk(self) -> Iterator[Equation]:
        """Yield all equations, those of bodies before the equation that holds them."""
        for equation in self.equations:
            for body in equation.bodies:
                yield from body.walk()
            yield equation


@dataclasses.dataclass(frozen=True)
class Traced:
    """A function's program, and which of its inputs are which parameters."""

    program: Program
    paths: tuple[str | None, ...]
    output_tree: Any

    @property
    def parameters(self) -> dict[str, Value]:
        """The values of the parameters by path."""
        return {
            path: value
            for path, value in zip(self.paths, self.program.inputs, strict=True)
            if path is not None
        }


def trace(fn: Callable[..., Any], params: Any, *inputs: Any) -> Traced:
    """Trace ``fn(params, *inputs)`` without running it.

    Args:
      fn: a JAX function.
      params: tree of arrays or ``jax.ShapeDtypeStruct``; random keys are not labelled.
      *inputs: trees of arrays or ``jax.ShapeDtypeStruct``; shapes may be symbolic.
    """
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(params, *inputs)
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    program = flatten(closed)
    paths: list[str | None] = [path_name(path) for path, _ in flat]
    paths += [None] * (len(program.inputs) - len(paths))
    return Traced(program, tuple(paths), jax.tree.structure(shape))


def flatten(closed: core.ClosedJaxpr, caller: str = "unknown source") -> Program:
    """Return the program of a jaxpr, its calls inlined."""
    jaxpr = closed.jaxpr
    program = Program([_value(var) for var in jaxpr.invars], {}, [], [])
    environment = dict(zip(jaxpr.invars, program.inputs, strict=True))
    program.outputs = _inline(program, jaxpr, closed.consts, environment, caller)
    return program


def _value(var: Any) -> Value:
    return Value(*_type(var))


def _type(var: Any) -> tuple[tuple[Any, ...], Any]:
    return tuple(var.aval.shape), var.aval.dtype


def _inline(
    program: Program,
    jaxpr: Any,
    consts: Any,
    environment: dict[Any, Value],
    caller: str = "unknown source",
) -> list[Value]:
    """Append a jaxpr's equations to a program and return its outputs.

    Inside JAX's own functions equations have no source line; they get the caller's.
    """

    def read(var: Any) -> Value:
        if isinstance(var, core.Literal):
            return Literal(*_type(var), var.val)
        return environment[var]

    for var, const in zip(jaxpr.constvars, consts, strict=True):
        environment[var] = _value(var)
        program.constants[environment[var]] = const
    for eqn in jaxpr.eqns:
        name, inputs = eqn.primitive.name, [read(var) for var in eqn.invars]
        source = source_line(eqn) or caller
        if name in CALLS:
            inner, inner_consts = opened(eqn.params[CALLS[name]])
            called = dict(zip(inner.invars, inputs, strict=True))
            outputs = _inline(program, inner, inner_consts, called, source)
        else:
            outputs = [_value(var) for var in eqn.outvars]
            program.equations.append(
                Equation(
                    eqn.primitive,
                    inputs,
                    outputs,
                    dict(eqn.params),
                    source,
                    _bodies(eqn, source),
                )
            )
        environment.update(zip(eqn.outvars, outputs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _bodies(eqn: Any, source: str) -> tuple[Program, ...]:
    held = [eqn.params[name] for name in _BODIES.get(eqn.primitive.name, ())]
    bodies = [
        body for one in held for body in (one if isinstance(one, tuple) else [one])
    ]
    return tuple(flatten(body, source) for body in bodies)


def literal_array(literal: Literal) -> np.ndarray:
    """Return a literal as a NumPy array of its dtype."""
    return np.asarray(literal.value, literal.dtype)
