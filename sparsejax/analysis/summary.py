"""How many weights are active, as a table."""

import math

import chex
import jax.numpy as jnp
import optax

from sparsejax.masks.layout import named_leaves

_HEADER = ("parameter", "shape", "active", "total", "density")


def summary(params: optax.Params, masks: chex.ArrayTree) -> str:
    """Return a table with a line for each parameter: how much of it is active.

    The last lines add up the parameters that have a mask, and all of them.

    Args:
      params: tree of arrays or `jax.ShapeDtypeStruct`.
      masks: tree like ``params`` of bool arrays, ``True`` where a weight is active,
        and None where a leaf is dense, as `sparsejax.sparse_optax.get_masks` returns
        it; None alone for a network without masks.

    Returns:
      The lines, joined.

    Raises:
      ValueError: a mask without a parameter of its path and shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import analysis
      >>> params = {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(4)}
      >>> masks = {"kernel": jnp.eye(2, 4) > 0, "bias": None}
      >>> print(analysis.summary(params, masks))
      parameter  shape  active  total  density
      bias       4           4      4    dense
      kernel     2x4         2      8   25.00%
      sparse                 2      8   25.00%
      all                    6     12   50.00%
    """
    shapes = {path: leaf.shape for path, leaf in named_leaves(params).items()}
    named = named_leaves(masks)
    for path, mask in named.items():
        if mask.shape != shapes.get(path):
            raise ValueError(
                f"summary: the mask of {path} has the shape {mask.shape} and needs a "
                f"parameter of that path and shape; the parameters are {shapes}."
            )
    total = {path: math.prod(shape) for path, shape in shapes.items()}
    active = {path: int(jnp.sum(mask)) for path, mask in named.items()}
    rows = [
        (path, "x".join(map(str, shape)), active.get(path), total[path])
        for path, shape in shapes.items()
    ]
    sparse = sum(active.values()), sum(total[path] for path in active)
    dense = sum(total.values()) - sparse[1]
    rows.append(("sparse", "", *sparse))
    rows.append(("all", "", sparse[0] + dense, sparse[1] + dense))
    return _aligned([_HEADER, *(_cells(*row) for row in rows)])


def _cells(name: str, shape: str, active: int | None, total: int) -> tuple[str, ...]:
    if active is None:
        return name, shape, f"{total:,}", f"{total:,}", "dense"
    density = active / total if total else 0.0
    return name, shape, f"{active:,}", f"{total:,}", f"{density:.2%}"


def _aligned(rows: list[tuple[str, ...]]) -> str:
    """Join cells to lines, names and shapes to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    return "\n".join("  ".join(cells) for cells in aligned)
