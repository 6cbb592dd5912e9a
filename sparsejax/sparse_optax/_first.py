"""The masks that an algorithm starts from: drawn at random, or given."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax._request import Request
from sparsejax._trees import check_same_leaves, tree_at
from sparsejax.distributions import Distribution
from sparsejax.masks.layout import Layout, Where, layouts_of, named_leaves
from sparsejax.masks.patterned import Patterns
from sparsejax.sparse_optax._core import Start


def first_masks(
    owner: str,
    *,
    sparsity: float | None,
    masks: Any,
    distribution: str | Distribution,
    where: Where,
    layout: Mapping[str, Layout] | None,
    pattern: Patterns,
) -> Start:
    """Return the start of an `Algorithm` from the arguments of a factory, checked."""
    if (sparsity is None) == (masks is None):
        raise ValueError(
            f"{owner} needs exactly one of sparsity=..., for a random mask, and "
            f"masks=..., got {'neither' if masks is None else 'both'}."
        )
    if sparsity is not None:
        request = Request(owner, sparsity, distribution, where, layout, pattern)
        return request.check().draw
    if (distribution, where, pattern) != ("erk", None, None):
        raise ValueError(
            f"{owner}(masks=...) says itself which weights are active; distribution=, "
            "where= and pattern= are for a random mask. Leave them out."
        )
    Request(owner, 0.0, distribution, where, layout).check()
    return _given(owner, masks, layout)


def _given(owner: str, masks: Any, layout: Mapping[str, Layout] | None) -> Start:
    named = named_leaves(masks)
    if not named:
        raise ValueError(f"{owner}(masks=...) must hold at least one mask, got none.")
    for path, mask in named.items():
        if getattr(mask, "dtype", None) != jnp.bool_:
            raise TypeError(
                f"{owner}(masks=...): the mask of {path} must be a bool array, True "
                f"where a weight is active, got {getattr(mask, 'dtype', type(mask))}."
            )

    def start(params: Any, _: jax.Array) -> tuple[Any, Any]:
        check_same_leaves(f"{owner}(masks=...)", params, masks)
        leaves, layouts = named_leaves(params), layouts_of(params, layout)
        placed, budgets = {}, {}
        for path, mask in named.items():
            leaf = leaves[path]
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(
                    f"{owner}(masks=...): {path} must be floating-point to be sparse, "
                    f"got {leaf.dtype}; make its mask None."
                )
            # Sharded as the leaf, and a copy: states are donated.
            placed[path] = jnp.zeros_like(leaf, dtype=bool) | mask
            over = layouts[path].layer_axes(leaf.ndim)
            budgets[path] = jnp.sum(placed[path], axis=over, dtype=jnp.int32)
        return tree_at(params, placed), tree_at(params, budgets)

    return start
