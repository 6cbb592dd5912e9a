"""Trees of masks: built, mapped over, and checked against parameters."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding

from sparsejax.masks.initial import random_masks
from sparsejax.masks.layout import Leaf, named_leaves


def where_sparse(f: Callable, masks: Any, *trees: Any, dense: Any = ...) -> Any:
    """Map ``f(mask, *leaves)`` over sparse leaves.

    Dense leaves are those of the first tree, or ``dense`` where that is given.
    """

    def leaf(mask, *leaves):
        if mask is not None:
            return f(mask, *leaves)
        return leaves[0] if dense is ... else dense

    return jax.tree.map(leaf, masks, *trees, is_leaf=lambda x: x is None)


def sparse_leaves(masks: Any, tree: Any) -> list[Any]:
    """Return the leaves of ``tree`` that have a mask."""
    return jax.tree.leaves(where_sparse(lambda _, x: x, masks, tree, dense=None))


def tree_at(params: Any, values: Mapping[str, Any]) -> Any:
    """Return a tree like ``params`` of values by path; None where there is none."""
    leaves = [values.get(path) for path in named_leaves(params)]
    return jax.tree.structure(params).unflatten(leaves)


def draw_masks(
    params: Any, leaves: Mapping[str, Leaf], budgets: Mapping[str, Any], key: jax.Array
) -> Any:
    """Draw a random mask for every sparse leaf, sharded as the leaf is."""
    named = named_leaves(params)
    weights = {path: named[path] for path in leaves}
    axes = tuple(x.layout.layer_axes(len(x.shape)) for x in leaves.values())
    shardings = tuple(_auto_sharding(weight) for weight in weights.values())
    masks = _drawer(axes, shardings)(key, weights, [budgets[path] for path in leaves])
    return tree_at(params, dict(zip(leaves, masks, strict=True)))


@functools.lru_cache(maxsize=64)
def _drawer(axes, shardings):
    """Return `random_masks` compiled for layers along ``axes``."""
    draw = lambda key, weights, k: random_masks(key, weights, k, axes)
    if all(sharding is None for sharding in shardings):
        return jax.jit(draw)
    return jax.jit(draw, out_shardings=list(shardings))


def _auto_sharding(weight):
    """Return the sharding to ask XLA for; traced and explicit types carry their own."""
    if isinstance(weight, Tracer) or not isinstance(weight, jax.Array):
        return None
    sharding = weight.sharding
    if not isinstance(sharding, NamedSharding):
        return None
    auto = all(kind == AxisType.Auto for kind in sharding.mesh.axis_types)
    return sharding if auto else None


def check_same_leaves(what: str, params: Any, masks: Any) -> None:
    """Raise ValueError unless every mask fits the parameter of the same path."""
    shapes = {path: leaf.shape for path, leaf in named_leaves(params).items()}
    for path, mask in named_leaves(masks).items():
        if path not in shapes:
            raise ValueError(
                f"{what}: there is a mask for {path} and no such parameter; the masks "
                f"belong to another model. The parameters are: {', '.join(shapes)}."
            )
        if mask.shape != shapes[path]:
            raise ValueError(
                f"{what}: the mask of {path} must have the shape of the parameter, "
                f"{shapes[path]}, got {mask.shape}; the masks belong to another model."
            )
