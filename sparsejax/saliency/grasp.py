"""GraSP: keep the gradient flowing after pruning."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.distributions import Distribution
from sparsejax.masks.layout import Layout, Where
from sparsejax.saliency._losses import Loss, add_up, of_weights
from sparsejax.saliency._target import Scope, Target, target


def grasp(
    loss: Loss,
    params: Any,
    batches: Iterable[Any],
    *,
    sparsity: float,
    scope: Scope = "global",
    distribution: str | Distribution = "erk",
    where: Where = None,
    layout: Mapping[str, Layout] | None = None,
) -> Any:
    """Keep the weights without which the norm of the gradient would fall most.

    The score of a weight is ``w * (H g)``, signed, with the gradient g and the Hessian
    H of the loss, each added up over batches and taken by the sparse weights alone.

    Args:
      loss: as in `snip`. The authors divide the logits by 200, and it matters: do so
        in ``loss``. A factor of the loss itself changes nothing.
      params: as in `magnitude`; before training, as a rule.
      batches: as in `snip`; gone through twice, so a list and no iterator.
      sparsity: as in `magnitude`.
      scope: as in `magnitude`.
      distribution: as in `magnitude`.
      where: as in `magnitude`.
      layout: as in `magnitude`.

    Returns:
      Masks, as `magnitude` returns them.

    Raises:
      ValueError: as `snip`.
      TypeError: as `magnitude`, or ``batches`` can be gone through only once.

    References:
      Wang et al. 2020, "Picking winning tickets before training by preserving gradient
      flow", section 4, algorithms 1 and 2; its score is the negative of this one,
      and the highest are removed.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import saliency
      >>> def loss(params, x):
      ...     return ((x @ params["kernel"]) ** 2).sum()
      >>> params = {"kernel": jnp.array([[3.0], [2.0]])}
      >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> masks = saliency.grasp(loss, params, [x], sparsity=0.5)
      >>> masks["kernel"].tolist()
      [[False], [True]]
    """
    chosen = target("grasp", params, sparsity, scope, distribution, where, layout)
    return chosen.masks(params, grasp_scores(loss, params, batches, chosen))


def grasp_scores(
    loss: Loss, params: Any, batches: Iterable[Any], chosen: Target
) -> list[jax.Array]:
    """Return ``w * sum over batches of (H g)``, float32 arrays."""
    if isinstance(batches, Iterator):
        raise TypeError(
            "grasp(batches) goes through the batches twice, for the gradient and then "
            f"for the Hessian; give a list of them, got {type(batches).__name__}."
        )

    def gradient(batch, params):
        at = of_weights(loss, chosen, params, batch)
        return jax.grad(at)(chosen.weights(params))

    def hessian_product(batch, params, vector):
        at = of_weights(loss, chosen, params, batch)
        _, product = jax.jvp(jax.grad(at), (chosen.weights(params),), (vector,))
        return product

    weights = chosen.weights(params)
    gradients = add_up("grasp", gradient, batches, params)
    gradients = [g.astype(w.dtype) for w, g in zip(weights, gradients, strict=True)]
    products = add_up("grasp", hessian_product, batches, params, gradients)
    pairs = zip(weights, products, strict=True)
    return [w.astype(jnp.float32) * product for w, product in pairs]
