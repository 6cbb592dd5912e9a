"""A conditional that stays one under vmap."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap


def change_if(
    pred: jax.Array,
    change: Callable[[list[jax.Array], Any], list[jax.Array]],
    masks: list[jax.Array],
    operands: Any,
) -> list[jax.Array]:
    """Return ``change(masks, operands)`` if ``pred``, else ``masks``.

    `jax.vmap` turns a `lax.cond` on a batched predicate into a select that runs both
    branches at every step. Here ``change`` runs for the whole batch when any of its
    elements asks for it, and not otherwise, however deep vmaps nest.

    Only masks leave the conditional: XLA copies whatever a branch hands through, so
    weights and optimizer slots are read by it and never returned.

    Args:
      pred: bool scalar.
      change: pure function of masks and operands; it closes over no tracer.
      masks: list of arrays.
      operands: tree of arrays that ``change`` reads.
    """

    @custom_vmap
    def conditional(pred, masks, operands):
        return lax.cond(pred, change, lambda masks, _: masks, masks, operands)

    @conditional.def_vmap
    def batched(size, in_batched, pred, masks, operands):
        pred_batched, masks_batched, operands_batched = in_batched
        masks = [
            mask if is_batched else jnp.broadcast_to(mask, (size, *mask.shape))
            for mask, is_batched in zip(masks, masks_batched, strict=True)
        ]
        axes = jax.tree.map(lambda b: 0 if b else None, operands_batched)

        def change_each(masks, operands_and_pred):
            operands, pred = operands_and_pred

            def change_one(masks, operands, pred):
                changed = change(masks, operands)
                pairs = zip(changed, masks, strict=True)
                return [jnp.where(pred, new, old) for new, old in pairs]

            pred_axis = 0 if pred_batched else None
            return jax.vmap(change_one, (0, axes, pred_axis))(masks, operands, pred)

        masks = change_if(jnp.any(pred), change_each, masks, (operands, pred))
        return masks, [True] * len(masks)

    return conditional(pred, masks, operands)
