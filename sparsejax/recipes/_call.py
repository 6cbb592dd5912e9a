"""The call of a ghosted model: what its parts share while it lasts."""

import contextvars
import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(eq=False)
class Call:
    """One call of a model.

    Attributes:
      intensity: of its ghosts.
      convolutions: the convolutions that were called, their inputs and outputs.
      norms: the norms that were watched, and their inputs.
    """

    intensity: jax.Array
    convolutions: list[tuple[Any, jax.Array, jax.Array]] = dataclasses.field(
        default_factory=list
    )
    norms: list[tuple[Any, jax.Array]] = dataclasses.field(default_factory=list)


under_way: contextvars.ContextVar[Call | None] = contextvars.ContextVar(
    "call of a ghosted model", default=None
)
