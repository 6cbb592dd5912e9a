"""What the neurons of a layer are worth, one number each."""

from typing import Literal

import jax
import jax.numpy as jnp

from sparsejax.masks.blend import masked

Criterion = Literal["magnitude", "count"]
CRITERIA = ("magnitude", "count")


def from_weights(
    criterion: Criterion, mask: jax.Array, weights: jax.Array, axes: tuple[int, ...]
) -> jax.Array:
    """Return the sum of ``|w|`` over active weights, or their number, over some axes.

    Args:
      criterion: "magnitude" or "count".
      mask: bool array.
      weights: float array like ``mask``.
      axes: to sum over.

    Returns:
      float32, with axes of size 1 where it was summed.
    """
    if criterion == "count":
        values = mask
    else:
        values = masked(mask, jnp.abs(weights))
    return jnp.sum(values, axis=axes, keepdims=True, dtype=jnp.float32)


def feature_norm(activations: jax.Array, order: Literal[1, 2] = 1) -> jax.Array:
    """Score channels by the norm of their feature maps.

    Args:
      activations: float [..., channels], what a layer puts out; all other axes, of
        examples and positions, are summed over.
      order: 1 for the sum of magnitudes, 2 for the root of the sum of squares.

    Returns:
      float32 [channels]; of several batches, add up scores (of order 2: their squares).

    Raises:
      ValueError: another order.

    References:
      Chen et al. 2022, "Coarsening the granularity", section 3.2 and its ablation.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import lottery
      >>> y = jnp.array([[3.0, 1.0], [-4.0, 1.0]])
      >>> lottery.feature_norm(y).tolist(), lottery.feature_norm(y, 2)[0].item()
      ([7.0, 2.0], 5.0)
    """
    if order not in (1, 2):
        raise ValueError(f"feature_norm(order=...) must be 1 or 2, got {order!r}.")
    rows = _rows(activations)
    return jnp.linalg.norm(rows, ord=order, axis=0)


def feature_saliency(activations: jax.Array, gradients: jax.Array) -> jax.Array:
    """Score channels by what the loss would change by without their feature maps.

    To first order that is ``sum(activation * gradient)`` over the positions of an
    example; its magnitude is added up over examples.

    Args:
      activations: float [examples, ..., channels], what a layer puts out.
      gradients: of the loss by ``activations``, of the same shape.

    Returns:
      float32 [channels]; of several batches, add up scores.

    Raises:
      ValueError: the shapes differ.

    References:
      Molchanov et al. 2017, "Pruning convolutional neural networks for resource
      efficient inference", equation 8, without its division by the number of positions,
      which all channels of a layer share.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import lottery
      >>> y = jnp.array([[3.0, 1.0], [-4.0, 1.0]])
      >>> lottery.feature_saliency(y, jnp.ones((2, 2))).tolist()
      [7.0, 2.0]
    """
    if activations.shape != gradients.shape:
        raise ValueError(
            "feature_saliency: activations and gradients must have one shape, got "
            f"{activations.shape} and {gradients.shape}."
        )
    product = activations.astype(jnp.float32) * gradients.astype(jnp.float32)
    over = tuple(range(1, product.ndim - 1))
    return jnp.sum(jnp.abs(jnp.sum(product, axis=over)), axis=0)


def _rows(activations: jax.Array) -> jax.Array:
    return activations.astype(jnp.float32).reshape(-1, activations.shape[-1])
