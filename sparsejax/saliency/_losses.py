"""Derivatives of a loss by the weights that are to be sparse, added up over batches."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.saliency._target import Target

Loss = Callable[[Any, Any], jax.Array]


def of_weights(
    loss: Loss, chosen: Target, params: Any, batch: Any
) -> Callable[[list[jax.Array]], jax.Array]:
    """Return the loss on a batch as a function of the chosen weights alone."""
    return lambda weights: loss(chosen.replace(params, weights), batch)


def add_up(
    owner: str,
    f: Callable[..., list[jax.Array]],
    batches: Iterable[Any],
    *args: Any,
) -> list[jax.Array]:
    """Add up ``f(batch, *args)`` over batches, in float32; compiled once a shape.

    Raises:
      ValueError: there are no batches.
    """

    @jax.jit
    def one(batch, *args):
        return [x.astype(jnp.float32) for x in f(batch, *args)]

    total = None
    for batch in batches:
        found = one(batch, *args)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        raise ValueError(f"{owner}(batches): at least one batch is needed, got none.")
    return total
