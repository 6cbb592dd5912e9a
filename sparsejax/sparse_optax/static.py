"""Training under a mask that does not change."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparsejax._request import Request, check_key
from sparsejax._trees import check_same_leaves, tree_at
from sparsejax.distributions import Distribution
from sparsejax.masks.layout import Layout, Where, named_leaves
from sparsejax.masks.patterned import Patterns
from sparsejax.sparse_optax._core import Algorithm, transformation


def static(
    inner: optax.GradientTransformation | None = None,
    *,
    sparsity: float | None = None,
    masks: optax.Params | None = None,
    distribution: str | Distribution = "erk",
    where: Where = None,
    layout: Mapping[str, Layout] | None = None,
    pattern: Patterns = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Train under a fixed mask: a random one, or one that is given.

    Args:
      inner: the optimizer to run under the mask; None makes this the last link of a
        chain.
      sparsity: fraction of weights that are zero, in [0, 1), for a random mask.
      masks: tree like the parameters of bool arrays, ``True`` where a weight is active,
        and None where a leaf is dense. Takes the place of ``sparsity``.
      distribution: "erk", "uniform", or a function ``(shapes, sparsity) -> kept`` as
        in `sparsejax.distributions`.
      where: which leaves are sparse; see `sparsejax.masks.select_leaves`.
      layout: dict from path regex to `sparsejax.masks.Layout`.
      pattern: as in `rigl`, for a random mask.
      key: PRNG key of the random mask; ``jax.random.key(0)`` by default.

    Returns:
      An optax transformation with a `SparseState`.

    Raises:
      ValueError, TypeError: arguments that cannot be meant, here; a tree that does not
        fit, at ``init``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from sparsejax import sparse_optax
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> masks = {"kernel": jnp.array([[True, False], [False, True]])}
      >>> tx = sparse_optax.static(optax.sgd(0.5), masks=masks)
      >>> opt_state = tx.init(params)
      >>> updates, opt_state = tx.update(params, opt_state, params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [[0.5, 0.0], [0.0, 0.5]]
    """
    if (sparsity is None) == (masks is None):
        raise ValueError(
            "static needs exactly one of sparsity=..., for a random mask, and "
            f"masks=..., got {'neither' if masks is None else 'both'}."
        )
    if masks is not None and (distribution, where, pattern) != ("erk", None, None):
        raise ValueError(
            "static(masks=...) says itself which weights are active; distribution=, "
            "where= and pattern= are for a random mask. Leave them out."
        )
    check_key("static", key)
    if sparsity is not None:
        request = Request("static", sparsity, distribution, where, layout, pattern)
        start = request.check().draw
    else:
        start = _start_from(masks)
    return transformation(Algorithm("static", start), inner, key)


def _start_from(masks: Any) -> Callable[[Any, jax.Array], tuple[Any, Any]]:
    """Return a start of an `Algorithm` with masks that are given."""
    named = named_leaves(masks)
    if not named:
        raise ValueError("static(masks=...) must hold at least one mask, got none.")
    for path, mask in named.items():
        if getattr(mask, "dtype", None) != jnp.bool_:
            raise TypeError(
                f"static(masks=...): the mask of {path} must be a bool array, True "
                f"where a weight is active, got {getattr(mask, 'dtype', type(mask))}."
            )

    def start(params, _):
        check_same_leaves("static(masks=...)", params, masks)
        leaves = named_leaves(params)
        for path in named:
            if not jnp.issubdtype(leaves[path].dtype, jnp.floating):
                raise TypeError(
                    f"static(masks=...): {path} must be floating-point to be sparse, "
                    f"got {leaves[path].dtype}; make its mask None."
                )
        # Sharded as the leaf, and a copy: donating the state leaves the masks given.
        placed = {
            path: jnp.zeros_like(leaves[path], dtype=bool) | mask
            for path, mask in named.items()
        }
        own = tree_at(params, placed)
        return own, jax.tree.map(lambda mask: jnp.sum(mask, dtype=jnp.int32), own)

    return start
