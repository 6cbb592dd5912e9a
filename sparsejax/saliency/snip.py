"""SNIP: single-shot pruning by connection sensitivity."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax._trees import check_same_leaves
from sparsejax.distributions import Distribution
from sparsejax.masks.layout import Layout, Where, named_leaves
from sparsejax.saliency._losses import Loss, add_up, of_weights
from sparsejax.saliency._target import Scope, Target, target


def snip(
    loss: Loss,
    params: Any,
    batches: Iterable[Any],
    *,
    sparsity: float,
    masks: Any = None,
    scope: Scope = "global",
    distribution: str | Distribution = "erk",
    where: Where = None,
    layout: Mapping[str, Layout] | None = None,
) -> Any:
    """Keep the weights to whose presence the loss is most sensitive.

    The score of a weight is ``|dL/dm|``, the derivative by a factor m of the weight,
    where m is 1, or what a mask says. A weight that ``masks`` prunes can so come back.

    Args:
      loss: ``(params, batch) -> loss``, a scalar. Norms may use the statistics of the
        batch; what they would update is dropped. An NNX module that is merged in it is
        merged with ``copy=True``.
      params: as in `magnitude`; before training, as a rule.
      batches: what ``loss`` takes; the derivative is added up over all of them before
        its magnitude is taken. Ten examples of each class are usual.
      sparsity: as in `magnitude`.
      masks: where the derivative is taken, a tree like what is returned. A leaf without
        a mask has all weights active, and so has a network without masks.
      scope: as in `magnitude`.
      distribution: as in `magnitude`.
      where: as in `magnitude`.
      layout: as in `magnitude`.

    Returns:
      Masks, as `magnitude` returns them.

    Raises:
      ValueError: as `magnitude`, no batches, or masks of another tree.
      TypeError: as `magnitude`.

    References:
      Lee et al. 2019, "SNIP: single-shot network pruning based on connection
      sensitivity", section 4.1, equations 4 to 6; de Jorge et al. 2021, "Progressive
      skeletonization", section 3, for derivatives under a mask.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import saliency
      >>> def loss(params, x):
      ...     return (x @ params["kernel"]).sum()
      >>> params = {"kernel": jnp.array([[3.0], [2.0]])}
      >>> x = jnp.array([[1.0, 2.0]])
      >>> masks = saliency.snip(loss, params, [x], sparsity=0.5)
      >>> masks["kernel"].tolist()
      [[False], [True]]
    """
    chosen = target("snip", params, sparsity, scope, distribution, where, layout)
    return chosen.masks(params, snip_scores(loss, params, batches, chosen, masks))


def snip_scores(
    loss: Loss,
    params: Any,
    batches: Iterable[Any],
    chosen: Target,
    masks: Any = None,
) -> list[jax.Array]:
    """Return ``|sum over batches of dL/dm|``, float32 arrays."""
    check_same_leaves("snip(masks=...)", params, masks)
    active = named_leaves(masks)
    factors = [
        active.get(leaf.path, jnp.ones_like(w)).astype(w.dtype)
        for leaf, w in zip(chosen.leaves, chosen.weights(params), strict=True)
    ]

    def gradient(batch, params, factors):
        at = of_weights(loss, chosen, params, batch)
        weights = chosen.weights(params)
        times = lambda factors: [m * w for m, w in zip(factors, weights, strict=True)]
        return jax.grad(lambda factors: at(times(factors)))(factors)

    gradients = add_up("snip", gradient, batches, params, factors)
    return [jnp.abs(g) for g in gradients]
