"""What all who read jaxprs need: calls that only call, bodies, and the user's line."""

from collections.abc import Sequence
from typing import Any

from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr

# Primitives that only call, and the parameter that holds what they call.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
    "composite": "jaxpr",
    "remat2": "jaxpr",
}

_LIBRARIES = {"equinox", "flax", "haiku"}


def opened(program: ClosedJaxpr | Jaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    """Return a jaxpr and its constants, of which an open one has none."""
    closed = isinstance(program, ClosedJaxpr)
    return (program.jaxpr, program.consts) if closed else (program, ())


def source_line(eqn: Any) -> str:
    """Return ``file.py:line`` of the user's line that made an equation, or ``""``.

    That is the innermost line which belongs neither to JAX nor to a library of layers.
    """
    frames = source_info_util.summarize(eqn.source_info, num_frames=32).splitlines()
    places = [frame.strip().split(" ")[0] for frame in frames]
    own = [place for place in places if not _LIBRARIES & set(place.split("/"))]
    place = (own or places or [""])[-1]  # the innermost comes last
    return ":".join(place.rsplit("/", 1)[-1].split(":")[:2])
