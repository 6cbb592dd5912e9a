"""Trees of masks: built, mapped over, and checked against parameters."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from sparsejax.masks.initial import auto_sharding, random_masks
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
    weights = [named[path] for path in leaves]
    axes = tuple(x.layout.layer_axes(len(x.shape)) for x in leaves.values())
    shardings = tuple(map(auto_sharding, weights))
    draw = _drawer(tuple(leaves), axes, shardings)
    masks = draw(key, weights, [budgets[path] for path in leaves])
    return tree_at(params, dict(zip(leaves, masks, strict=True)))


@functools.lru_cache(maxsize=64)
def _drawer(names, axes, shardings):
    """Return `random_masks` compiled for layers along ``axes``.

    Weights come as a list: jit would sort a dict by its keys, "10" before "2".
    """

    def draw(key, weights, k):
        named = dict(zip(names, weights, strict=True))
        return random_masks(key, named, k, axes)

    if all(sharding is None for sharding in shardings):
        return jax.jit(draw)
    return jax.jit(draw, out_shardings=list(shardings))


def check_same_tree(what: str, params: Any, masks: Any) -> None:
    """Raise ValueError unless masks and their Nones are a tree like the parameters."""
    check_same_leaves(what, params, masks)
    marked = jax.tree.map(lambda _: 0, masks, is_leaf=lambda x: x is None)
    known = named_leaves(marked)
    for path in named_leaves(params):
        if path not in known:
            raise ValueError(
                f"{what}: there is a parameter {path} that the state does not know; it "
                f"belongs to another model, of {', '.join(known)}."
            )


def check_gradients(what: str, gradients: Any, masks: Any) -> None:
    """Raise ValueError unless there is a gradient that fits every mask."""
    named = named_leaves(gradients)
    for path, mask in named_leaves(masks).items():
        got = named[path].shape if path in named else "nothing"
        if got != mask.shape:
            raise ValueError(
                f"{what} must have an array of shape {mask.shape} for {path}, got "
                f"{got}; pass gradients of the parameters."
            )


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
