"""Training under a mask that does not change."""

from collections.abc import Mapping

import jax
import optax

from sparsejax._request import check_key
from sparsejax.distributions import Distribution
from sparsejax.masks.layout import Layout, Where
from sparsejax.masks.patterned import Patterns
from sparsejax.sparse_optax._core import Algorithm, transformation
from sparsejax.sparse_optax._first import first_masks


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
    check_key("static", key)
    start = first_masks(
        "static",
        sparsity=sparsity,
        masks=masks,
        distribution=distribution,
        where=where,
        layout=layout,
        pattern=pattern,
    )
    return transformation(Algorithm("static", start), inner, key)
