"""Random pruning, the baseline that a score has to beat."""

from collections.abc import Mapping
from typing import Any

import jax

from sparsejax._request import check_key
from sparsejax.distributions import Distribution
from sparsejax.masks.initial import random_scores, random_words
from sparsejax.masks.layout import Layout, Where
from sparsejax.saliency._target import Scope, target


def random(
    params: Any,
    *,
    sparsity: float,
    key: jax.Array,
    scope: Scope = "global",
    distribution: str | Distribution = "erk",
    where: Where = None,
    layout: Mapping[str, Layout] | None = None,
) -> Any:
    """Keep weights that are drawn at random.

    With "global" scope every set of so many weights is equally likely, so that layers
    are about equally dense; with "layer" scope masks are those that
    `sparsejax.sparse_optax.static` draws from the same key, stacked layers apart.

    Args:
      params: as in `magnitude`.
      sparsity: as in `magnitude`.
      key: a PRNG key; a leaf's own is folded from its path.
      scope: as in `magnitude`.
      distribution: as in `magnitude`.
      where: as in `magnitude`.
      layout: as in `magnitude`.

    Returns:
      Masks, as `magnitude` returns them.

    Raises:
      ValueError, TypeError: as `magnitude`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import saliency
      >>> params = {"a": jnp.ones((8, 4)), "b": jnp.ones((4, 2))}
      >>> masks = saliency.random(params, sparsity=0.75, key=jax.random.key(0))
      >>> int(masks["a"].sum() + masks["b"].sum())
      10
    """
    chosen = target("random", params, sparsity, scope, distribution, where, layout)
    if key is None:
        raise TypeError("random(key=...) must be a PRNG key, got None.")
    check_key("random", key)
    words = random_words(key, [leaf.path for leaf in chosen.leaves])
    weights = chosen.weights(params)
    scores = [random_scores(own, w) for own, w in zip(words, weights, strict=True)]
    return chosen.masks(params, scores)
