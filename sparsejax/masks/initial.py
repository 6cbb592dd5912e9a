"""First masks, and first weights for them."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding

from sparsejax.masks._random import random_masks, random_scores, random_words
from sparsejax.masks.layout import Layout
from sparsejax.masks.selection import top_k_mask

__all__ = [
    "random_mask",
    "random_masks",
    "random_scores",
    "random_words",
    "sparse_init",
]


def random_mask(
    key: jax.Array,
    weight: jax.Array,
    k: chex.Numeric,
    *,
    axis: int | tuple[int, ...] | None = None,
) -> jax.Array:
    """Draw a mask uniformly among those with exactly ``k`` active weights.

    Args:
      key: a PRNG key.
      weight: array whose shape and sharding the mask takes; its values do not matter.
        Inside `jax.jit`, under a mesh with Auto axes, XLA decides on the sharding.
      k: active weights, an integer, traced or not; with ``axis`` per slice along
        these axes (for one constant fan-in, the fan-in axes).
      axis: the axes of a slice; ``None``: the whole array.

    Returns:
      Bool array, ``True`` where a weight is active.

    Example:
      >>> import jax
      >>> from sparsejax import masks
      >>> mask = masks.random_mask(jax.random.key(0), jax.numpy.ones((4, 8)), 6)
      >>> int(mask.sum())
      6
    """
    words = jax.random.bits(key, (2,))
    mask = top_k_mask(random_scores(words, weight), k, axis=axis)
    sharding = auto_sharding(weight)
    return mask if sharding is None else jax.device_put(mask, sharding)


def auto_sharding(weight: jax.Array) -> jax.sharding.NamedSharding | None:
    """Return the sharding that what is made for ``weight`` must be given.

    None for a traced array, and where axes of the mesh are explicit: there what is
    computed from the weight is sharded as it is.
    """
    if isinstance(weight, Tracer) or not isinstance(weight, jax.Array):
        return None
    sharding = weight.sharding
    if not isinstance(sharding, NamedSharding):
        return None
    auto = all(kind == AxisType.Auto for kind in sharding.mesh.axis_types)
    return sharding if auto else None


def sparse_init(
    key: jax.Array,
    weight: jax.Array,
    mask: jax.Array,
    *,
    layout: Layout | None = None,
    variant: Literal["variance", "std"] = "variance",
) -> jax.Array:
    """Draw active weights afresh from a normal whose scale fits their own fan-in.

    A neuron with k active inputs passes its signal on through ReLU at unit variance
    when its weights have variance 2/k; a dense initialiser, which sees the full
    fan-in, starts sparse networks with vanishing activations.

    Args:
      key: a PRNG key.
      weight: array whose shape, dtype and sharding the result takes.
      mask: bool array of the shape of ``weight``.
      layout: which axes are neurons; ``None`` means the last one.
      variant: ``"variance"`` draws with variance 2/k (Evci et al. 2022, "Gradient
        flow in sparse neural networks", section 4); ``"std"`` with standard
        deviation 2/k, as the released code of SRigL does (Lasby et al. 2024), about
        sqrt(k/2) times smaller.

    Returns:
      Array like ``weight``; exactly 0 off the mask.

    Raises:
      ValueError: unknown variant, or ``mask`` of another shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import masks
      >>> weight = jnp.zeros((64, 3))
      >>> mask = masks.random_mask(jax.random.key(0), weight, 96)
      >>> weight = masks.sparse_init(jax.random.key(1), weight, mask)
      >>> bool(((weight != 0) == mask).all())
      True
    """
    if variant not in ("variance", "std"):
        raise ValueError(
            f'sparse_init(variant=...) must be "variance" or "std", got {variant!r}.'
        )
    if mask.shape != weight.shape:
        raise ValueError(
            f"sparse_init: the mask must have the shape of the weight, {weight.shape}, "
            f"got {mask.shape}."
        )
    axes = (layout or Layout()).fan_in_axes(weight.ndim)
    fan_in = jnp.sum(mask, axis=axes, keepdims=True, dtype=jnp.int32)
    scale = 2.0 / jnp.maximum(fan_in, 1).astype(jnp.float32)
    scale = jnp.sqrt(scale) if variant == "variance" else scale
    drawn = jax.random.normal(key, weight.shape) * scale
    return jnp.where(mask, drawn, 0.0).astype(weight.dtype)
