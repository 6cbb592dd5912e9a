"""Ghost skips: a 1x1 convolution and a BatchNorm beside a convolution."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

WEIGHT = 1e-4


class GhostSkip(nnx.Module):
    """A 1x1 convolution with its own BatchNorm, beside a convolution and its norm.

    It has the strides and groups of the convolution and no bias: beside a depthwise
    convolution it is a scale for each channel. All of its weights are 1e-4 at first,
    but the norm makes its output as large as any. Its channels are equal at first.

    Ghosts are dense whatever the sparsity: the weights are called ``scale``, and no
    leaf of that name is sparse unless a predicate ``where=`` of one's own chooses it.

    `add_ghosts` puts ghosts into a model. A module of one's own can hold them too and
    add them, times an intensity, before its activation.

    Args:
      conv: the convolution; its kernel is not used.
      norm: the norm behind it, whose options the ghost's has.

    References:
      Jaiswal et al. 2022, "Training your sparse neural network better with any mask",
      section 3, which has them in residual blocks of two convolutions.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from sparsejax import recipes
      >>> conv = nnx.Conv(3, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
      >>> ghost = recipes.GhostSkip(conv, nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
      >>> ghost(jnp.ones((1, 32, 32, 3))).shape, ghost.scale.shape
      ((1, 16, 16, 8), (3, 8))
    """

    def __init__(self, conv: nnx.Conv, norm: nnx.BatchNorm):
        rank = len(conv.kernel_size)
        center = (..., *(0,) * rank, slice(None), slice(None))
        self.scale = nnx.Param(jnp.full_like(conv.kernel[center], WEIGHT))
        self.norm = _as_new(norm)
        self.strides = strides_of(conv)
        self.groups = conv.feature_group_count
        self.dtype = conv.dtype

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Return [..., *spatial / strides, out] for x [..., *spatial, in].

        Further arguments are those of the norm.
        """
        steps = (slice(None, None, stride) for stride in self.strides)
        x = x[(..., *steps, slice(None))]
        dtype = self.dtype or jnp.result_type(x.dtype, self.scale.dtype)
        # [in of a group, groups, out of a group]
        weights = self.scale[...].reshape(self.scale.shape[0], self.groups, -1)
        grouped = x.reshape(*x.shape[:-1], self.groups, -1)
        y = jnp.einsum("...gi,igo->...go", grouped.astype(dtype), weights.astype(dtype))
        return self.norm(y.reshape(*x.shape[:-1], -1), *args, **kwargs)


def strides_of(conv: nnx.Conv) -> tuple[int, ...]:
    """Return the strides of a convolution along each spatial axis."""
    own = 1 if conv.strides is None else conv.strides
    return (own,) * len(conv.kernel_size) if isinstance(own, int) else tuple(own)


def _as_new(norm: nnx.BatchNorm) -> nnx.BatchNorm:
    """Return a norm of the same options, as it is before training."""
    new = nnx.clone(norm)
    for name in ("scale", "var"):
        _fill(new, name, jnp.ones_like)
    for name in ("bias", "mean"):
        _fill(new, name, jnp.zeros_like)
    return new


def _fill(norm: nnx.BatchNorm, name: str, like: Any) -> None:
    variable = getattr(norm, name)
    if variable is not None:
        variable.set_value(like(variable.get_value()))
