"""Updates of unstructured masks: drop and grow, and pruning.

Each comes for one array, and for all arrays of a network in one search, which
compiles once and runs as one loop.
"""

from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp

from sparsejax.masks._search import select
from sparsejax.masks.selection import checked_axes, checked_k

Axis = int | tuple[int, ...] | None


def drop_and_grow(
    mask: jax.Array,
    weight: jax.Array,
    grow_score: jax.Array,
    n_drop: chex.Numeric,
    *,
    axis: Axis = None,
) -> jax.Array:
    """Drop the active weights of least magnitude, grow as many elsewhere.

    The number of active weights stays as it is, whatever the values. Weights that
    were just dropped compete for growth with all others that are not kept; one that
    wins has in effect not been dropped. A NaN is never grown; on an active weight, as
    its value or its score, it counts as 0.

    Args:
      mask: bool array, ``True`` where a weight is active.
      weight: float array like ``mask``; ranked by magnitude.
      grow_score: float array like ``mask``; ranked by magnitude. The gradient of the
        masked network for RigL, `sparsejax.masks.random_scores` for SET.
      n_drop: how many to drop, an integer, traced or not, scalar or per slice.
      axis: the axes of a slice, when a leaf stacks several layers; ``None``: the
        whole array is one layer.

    Returns:
      The new mask.

    Raises:
      TypeError, ValueError: as `sparsejax.masks.top_k_mask`.

    References:
      Evci et al. 2020, "Rigging the lottery", section 3 and algorithm 1; Mocanu et
      al. 2018, "Scalable training of artificial neural networks with adaptive sparse
      connectivity", for random growth.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax.masks import unstructured
      >>> mask = jnp.array([True, True, False, False])
      >>> weight = jnp.array([0.1, -2.0, 0.0, 0.0])
      >>> gradient = jnp.array([0.0, 0.0, 1.0, -3.0])
      >>> unstructured.drop_and_grow(mask, weight, gradient, 1).tolist()
      [False, True, False, True]
    """
    active = jnp.sum(mask, axis=axis, dtype=jnp.int32)
    (mask,) = drop_and_grow_all(
        [mask], [weight], [grow_score], active=[active], n_drop=[n_drop], axes=[axis]
    )
    return mask


def drop_and_grow_all(
    masks: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    grow: Sequence[jax.Array],
    *,
    active: Sequence[chex.Numeric],
    n_drop: Sequence[chex.Numeric],
    axes: Sequence[Axis],
    grow_score: Callable[[jax.Array, jax.Array], jax.Array] = lambda grow, _: grow,
) -> list[jax.Array]:
    """Update several masks as `drop_and_grow` does each.

    Args:
      masks: bool arrays.
      weights: float arrays like the masks.
      grow: for each mask the grow scores, or what ``grow_score`` makes them from.
      active: how many weights are active in each mask, scalar or per slice.
      n_drop: how many to drop from each, scalar or per slice.
      axes: the axes of a slice of each, or None.
      grow_score: ``(grow, weight) -> scores``, float arrays like the weight.

    Returns:
      The new masks.
    """
    operands = list(zip(masks, weights, grow, strict=True))
    like = [
        jnp.zeros_like(w, jnp.result_type(w, jax.eval_shape(grow_score, g, w)))
        for _, w, g in operands
    ]
    axes = checked_axes(like, masks, axes)
    total = checked_k(active, like, axes)
    keep = jnp.maximum(total - checked_k(n_drop, like, axes), 0)

    def candidates(round_, kept, operands):
        """Offer active weights to keep, then all that are not kept to grow."""
        keeping = round_ == 0
        offers = []
        for (mask, weight, grow), taken in zip(operands, kept, strict=True):
            score = jnp.where(keeping, weight, grow_score(grow, weight))
            offers.append((score, jnp.where(keeping, mask, ~taken), mask))
        return offers

    def wanted(round_, kept):
        return jnp.where(round_ == 0, keep, total - kept)

    return select(candidates, wanted, operands, like, axes, rounds=2, by_magnitude=True)


def prune(
    mask: jax.Array, weight: jax.Array, k: chex.Numeric, *, axis: Axis = None
) -> jax.Array:
    """Keep the ``k`` active weights of largest magnitude; no other becomes active.

    Args:
      mask: bool array, ``True`` where a weight is active.
      weight: float array like ``mask``; ranked by magnitude, a NaN as 0.
      k: how many stay active, an integer, traced or not, scalar or per slice; all
        that are active stay where they are fewer.
      axis: the axes of a slice; ``None``: the whole array.

    Returns:
      The new mask, a subset of ``mask``.

    Raises:
      TypeError, ValueError: as `sparsejax.masks.top_k_mask`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax.masks import unstructured
      >>> mask = jnp.array([True, True, True, False])
      >>> unstructured.prune(mask, jnp.array([0.1, -2.0, 0.5, 9.0]), 2).tolist()
      [False, True, True, False]
    """
    (mask,) = prune_all([mask], [weight], k=[k], axes=[axis])
    return mask


def prune_all(
    masks: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    *,
    k: Sequence[chex.Numeric],
    axes: Sequence[Axis],
) -> list[jax.Array]:
    """Update several masks as `prune` does each; every argument holds one for each."""
    axes = checked_axes(weights, masks, axes)
    wanted = checked_k(k, weights, axes)
    return _prune(masks, weights, wanted, axes)


def prune_together(
    masks: Sequence[jax.Array], weights: Sequence[jax.Array], k: chex.Numeric
) -> list[jax.Array]:
    """Keep the ``k`` active weights of largest magnitude among all arrays together.

    Args:
      masks: bool arrays.
      weights: float arrays like the masks, of one dtype.
      k: how many stay active in all, an integer, traced or not.

    Returns:
      The new masks.

    Raises:
      TypeError, ValueError: as `sparsejax.masks.global_top_k_mask`.
    """
    axes = checked_axes(weights, masks, together=True)
    wanted = checked_k([k], [jnp.zeros(())], [()])
    return _prune(masks, weights, wanted, axes, shared=True)


def _prune(masks, weights, wanted, axes, *, shared=False):
    offers = [(w, mask, mask) for mask, w in zip(masks, weights, strict=True)]
    return select(
        lambda _, kept, offers: offers,
        lambda *_: wanted,
        offers,
        weights,
        axes,
        shared=shared,
        by_magnitude=True,
    )
