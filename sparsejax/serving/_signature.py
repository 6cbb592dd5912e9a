"""What a served model takes and returns: names, shapes and dtypes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.serving._file import ServingError


class ArraySpec(NamedTuple):
    """One array: its name, its shape with a letter for a free size, its dtype."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


class Signature(NamedTuple):
    """The arrays that a served model takes and those that it returns."""

    inputs: tuple[ArraySpec, ...]
    outputs: tuple[ArraySpec, ...]

    def __str__(self) -> str:
        inputs, outputs = (", ".join(map(str, specs)) for specs in self)
        return f"({inputs}) -> ({outputs})"

    def to_json(self) -> dict[str, Any]:
        """Return the signature in lists and dicts."""
        return {
            side: [spec._asdict() for spec in specs]
            for side, specs in self._asdict().items()
        }

    @classmethod
    def from_json(cls, sides: Mapping[str, Any]) -> "Signature":
        """Invert `to_json`; other keys are ignored."""
        return cls(
            *(
                tuple(
                    ArraySpec(x["name"], tuple(x["shape"]), x["dtype"]) for x in specs
                )
                for specs in (sides["inputs"], sides["outputs"])
            )
        )


def describe(names: Iterable[str], arrays: Iterable[Any]) -> tuple[ArraySpec, ...]:
    """Describe arrays, or what has their shape and dtype."""
    return tuple(
        ArraySpec(
            name,
            tuple(n if isinstance(n, int) else str(n) for n in array.shape),
            str(array.dtype),
        )
        for name, array in zip(names, arrays, strict=True)
    )


def is_array(x: Any) -> bool:
    """Return whether ``x`` is an array of numbers, of JAX or NumPy; keys are not."""
    return isinstance(x, jax.Array | np.ndarray | np.generic) and not (
        jnp.issubdtype(x.dtype, jax.dtypes.extended)
    )


def check_inputs(specs: Sequence[ArraySpec], inputs: Sequence[Any]) -> None:
    """Raise ServingError unless every input fits its description.

    As everywhere in JAX, 64-bit numbers count as 32-bit ones unless
    ``jax_enable_x64`` is set. A letter stands for one size of 1 or more.
    """
    sizes: dict[str, int] = {}
    for spec, x in zip(specs, inputs, strict=True):
        if not is_array(x):
            raise ServingError(f"{spec} must be an array, got {type(x).__name__}.")
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
        known = "".join(f", {letter} = {size}" for letter, size in sizes.items())
        fits = len(x.shape) == len(spec.shape) and all(
            n == (sizes.setdefault(want, max(n, 1)) if isinstance(want, str) else want)
            for want, n in zip(spec.shape, x.shape, strict=True)
        )
        if not fits or str(dtype) != spec.dtype:
            (got,) = describe([spec.name], [x])
            raise ServingError(f"The model takes {spec}{known}; got {got}.")
