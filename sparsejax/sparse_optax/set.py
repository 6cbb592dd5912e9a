"""SET: drop the smallest weights, grow at random."""

from collections.abc import Mapping

import jax
import optax

from sparsejax.distributions import Distribution
from sparsejax.masks.initial import random_scores, random_words
from sparsejax.masks.layout import Layout, Where
from sparsejax.masks.patterned import Patterns
from sparsejax.schedules import Schedule
from sparsejax.sparse_optax._dynamic import Dynamic, drop_and_grow_transformation


def set(  # noqa: A001
    inner: optax.GradientTransformation | None = None,
    *,
    sparsity: float | None = None,
    masks: optax.Params | None = None,
    distribution: str | Distribution = "erk",
    where: Where = None,
    layout: Mapping[str, Layout] | None = None,
    pattern: Patterns = None,
    key: jax.Array | None = None,
    drop_fraction: float | Schedule = 0.3,
    start_at: int = 0,
    update_every: int = 100,
    stop_at: int | None = None,
    step_on_update: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Train a sparse network that replaces its smallest weights by random others.

    As `rigl`, but grown weights are drawn uniformly among all that are not kept. No
    gradient of inactive weights is needed, so as the last link of a chain it takes no
    ``grad=``.

    Args:
      inner: as in `rigl`.
      sparsity: as in `rigl`.
      masks: as in `rigl`.
      distribution: as in `rigl`.
      where: as in `rigl`.
      layout: as in `rigl`.
      pattern: as in `rigl`; with N:M this is what the library sparsimony calls SSET.
      key: PRNG key of the first mask and of all growth; ``jax.random.key(0)`` by
        default.
      drop_fraction: as in `rigl`.
      start_at: as in `rigl`.
      update_every: as in `rigl`.
      stop_at: as in `rigl`.
      step_on_update: as in `rigl`.

    Returns:
      An optax transformation with a `SparseState`.

    Raises:
      ValueError, TypeError: as `rigl`.

    References:
      Mocanu et al. 2018, "Scalable training of artificial neural networks with
      adaptive sparse connectivity inspired by network science", with magnitude in
      place of sign for the drop, as in Evci et al. 2020.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from sparsejax import sparse_optax
      >>> params = {"kernel": jnp.ones((8, 8))}
      >>> tx = optax.chain(optax.sgd(0.1), sparse_optax.set(sparsity=0.75))
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> int((optax.apply_updates(params, updates)["kernel"] != 0).sum())
      16
    """
    arguments = Dynamic(
        sparsity,
        distribution,
        where,
        layout,
        key,
        drop_fraction,
        start_at,
        update_every,
        stop_at,
        step_on_update,
        pattern=pattern,
        masks=masks,
    )

    def grow(leaves, now):
        words = random_words(now.key, [leaf.path for leaf in leaves])
        return {"grow": list(words), "grow_score": random_scores}

    return drop_and_grow_transformation(
        "set", inner, arguments, grow, needs_gradient=False
    )
