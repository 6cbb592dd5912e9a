"""What a jaxpr does, and what of it only under a condition."""

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params


def primitives(jaxpr: Any, conditional: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield the name of every primitive, and whether it is inside a ``cond``."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = eqn.primitive.name
        yield name, conditional
        for inner in jaxprs_in_params(eqn.params):
            yield from primitives(inner, conditional or name == "cond")


def outside_and_inside(function, *arguments) -> tuple[set[str], set[str]]:
    """Return the primitives of a function outside and inside of conditionals."""
    found = set(primitives(jax.make_jaxpr(function)(*arguments)))
    outside = {name for name, conditional in found if not conditional}
    return outside, {name for name, conditional in found if conditional}
