"""First-order Taylor pruning."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.distributions import Distribution
from sparsejax.masks.layout import Layout, Where
from sparsejax.saliency._losses import Loss, add_up, of_weights
from sparsejax.saliency._target import Scope, Target, target


def taylor(
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
    """Keep the weights whose removal would change the loss most, to first order.

    The score of a weight is ``|w * dL/dw|``. Where all weights are active it is that
    of `snip`: they are one method there. It belongs on trained weights; one that is
    zero has the score zero.

    Args:
      loss: as in `snip`.
      params: as in `magnitude`.
      batches: as in `snip`.
      sparsity: as in `magnitude`.
      scope: as in `magnitude`.
      distribution: as in `magnitude`.
      where: as in `magnitude`.
      layout: as in `magnitude`.

    Returns:
      Masks, as `magnitude` returns them.

    Raises:
      ValueError, TypeError: as `snip`.

    References:
      Molchanov et al. 2017, "Pruning convolutional neural networks for resource
      efficient inference", section 2.2, equation 7, for single weights.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import saliency
      >>> def loss(params, x):
      ...     return (x @ params["kernel"]).sum()
      >>> params = {"kernel": jnp.array([[3.0], [2.0]])}
      >>> x = jnp.array([[1.0, 2.0]])
      >>> masks = saliency.taylor(loss, params, [x], sparsity=0.5)
      >>> masks["kernel"].tolist()
      [[False], [True]]
    """
    chosen = target("taylor", params, sparsity, scope, distribution, where, layout)
    return chosen.masks(params, taylor_scores(loss, params, batches, chosen))


def taylor_scores(
    loss: Loss, params: Any, batches: Iterable[Any], chosen: Target
) -> list[jax.Array]:
    """Return ``|w * sum over batches of dL/dw|``, float32 arrays."""

    def gradient(batch, params):
        at = of_weights(loss, chosen, params, batch)
        return jax.grad(at)(chosen.weights(params))

    gradients = add_up("taylor", gradient, batches, params)
    pairs = zip(chosen.weights(params), gradients, strict=True)
    return [jnp.abs(w.astype(jnp.float32) * g) for w, g in pairs]
