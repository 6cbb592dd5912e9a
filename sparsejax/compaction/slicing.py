"""What is left of an array."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

Kept = Sequence[np.ndarray | None]


def take(leaf: Any, keep: Kept) -> Any:
    """Return what is left of an array.

    Args:
      leaf: JAX or NumPy array, or ``jax.ShapeDtypeStruct``.
      keep: for each axis the kept indices, or None for all.

    Returns:
      What ``leaf`` is, smaller. An array that is sharded by axes keeps its sharding
      along those whose new size its devices divide, and is replicated along others.
    """
    if all(kept is None for kept in keep):
        return leaf
    sizes = zip(leaf.shape, keep, strict=True)
    shape = tuple(n if kept is None else len(kept) for n, kept in sizes)
    sharding = _fitting(getattr(leaf, "sharding", None), shape)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)
    left = np.asarray(leaf)  # NumPy: one compilation for every shape would take long
    for axis, kept in enumerate(keep):
        if kept is not None:
            left = left.take(kept, axis)
    if isinstance(leaf, np.ndarray):
        return left
    return jax.device_put(left, sharding if leaf.committed else None)


def _fitting(sharding: Any, shape: tuple[int, ...]) -> Any:
    """Return a sharding for a new shape, less the axes that it does not divide."""
    if not isinstance(sharding, NamedSharding):
        return sharding

    def divides(size, names):
        names = (names,) if isinstance(names, str) else names or ()
        return size % math.prod(sharding.mesh.shape[name] for name in names) == 0

    pairs = zip(shape, sharding.spec, strict=False)
    spec = [names if divides(size, names) else None for size, names in pairs]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))
