"""Trees of masks: built, mapped over, and checked against parameters."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from sparsejax.masks.initial import auto_sharding
from sparsejax.masks.layout import named_leaves
from sparsejax.masks.patterned import Patterned, draw_all


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
    params: Any,
    leaves: Sequence[Patterned],
    budgets: Mapping[str, Any],
    key: jax.Array,
) -> Any:
    """Draw a random mask for every sparse leaf, sharded as the leaf is."""
    named = named_leaves(params)
    paths = [leaf.path for leaf in leaves]
    weights = [named[path] for path in paths]
    draw = _drawer(tuple(leaves), tuple(map(auto_sharding, weights)))
    masks = draw(key, weights, [budgets[path] for path in paths])
    return tree_at(params, dict(zip(paths, masks, strict=True)))


@functools.lru_cache(maxsize=64)
def _drawer(leaves, shardings):
    """Return `draw_all` compiled.

    Weights come as a list: jit would sort a dict by its keys, "10" before "2".
    """
    draw = lambda key, weights, budgets: draw_all(key, leaves, weights, budgets)
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


def first_difference(
    there: Mapping[str, Any], here: Mapping[str, Any]
) -> tuple[str, Any, Any] | None:
    """Return the first path of which two descriptions differ, and both of them.

    A description that has no such path says "missing"; None: they are equal.
    """
    for path in {**there, **here}:
        pair = there.get(path, "missing"), here.get(path, "missing")
        if pair[0] != pair[1]:
            return path, *pair
    return None
