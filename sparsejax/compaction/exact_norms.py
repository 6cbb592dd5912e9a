"""Normalisation over channels of which some are gone.

A channel that is zero adds nothing to a sum over channels, yet it counts in the mean.
The layers here divide by the counts that the full model divided by, with the same
primitives in the same order, so that what is left is normalised as it was.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from sparsejax.compaction.errors import CompactionError


class CompactLayerNorm(nnx.LayerNorm):
    """LayerNorm that lost features and divides by as many as there were.

    Args:
      num_features: how many are left.
      full_features: how many there were.
      **kwargs: those of ``nnx.LayerNorm``.
    """

    def __init__(self, num_features: int, full_features: int, **kwargs):
        super().__init__(num_features, **kwargs)
        self.full_features = full_features

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalise x over the reduction axes; see ``nnx.LayerNorm``."""
        x, scale, bias = _promoted(self, x, self.scale, self.bias)
        return over_features(self, x, scale, bias, self.full_features, mask=mask)


class CompactRMSNorm(nnx.RMSNorm):
    """RMSNorm that lost features and divides by as many as there were.

    Args:
      num_features: how many are left.
      full_features: how many there were.
      **kwargs: those of ``nnx.RMSNorm``.
    """

    def __init__(self, num_features: int, full_features: int, **kwargs):
        super().__init__(num_features, **kwargs)
        self.full_features = full_features

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Normalise x over the reduction axes; see ``nnx.RMSNorm``."""
        x, scale = _promoted(self, x, self.scale)
        full = self.full_features
        return over_features(self, x, scale, None, full, mask=mask, centred=False)


class CompactGroupNorm(nnx.GroupNorm):
    """GroupNorm whose groups lost channels and divide by as many as there were.

    Args:
      num_features: how many channels are left.
      full_group_size: how many channels a group had.
      **kwargs: those of ``nnx.GroupNorm``.
    """

    def __init__(self, num_features: int, full_group_size: int, **kwargs):
        super().__init__(num_features, **kwargs)
        self.full_group_size = full_group_size

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalise x over groups of channels; see ``nnx.GroupNorm``."""
        if mask is not None:
            raise CompactionError(
                "CompactGroupNorm takes no mask=: it names every channel, also those "
                f"that were removed, got shape {mask.shape}."
            )
        axes = range(1, x.ndim) if self.reduction_axes is None else self.reduction_axes
        if len(_resolved(axes, x.ndim)) != x.ndim - 1:
            raise CompactionError(
                "CompactGroupNorm(reduction_axes=...) must be all axes but the first "
                f"of x, of shape {x.shape}, got {self.reduction_axes}: for others "
                "nnx.GroupNorm takes the statistics of another group."
            )
        x, scale, bias = _promoted(self, x, self.scale, self.bias)
        left = self.num_groups, self.group_size
        return over_groups(self, x, scale, bias, left, self.full_group_size)


def _promoted(norm, x, *parameters):
    arrays = (None if p is None else p[...] for p in parameters)
    return norm.promote_dtype((x, *arrays), dtype=norm.dtype)


_COMPACT = {
    nnx.LayerNorm: CompactLayerNorm,
    nnx.RMSNorm: CompactRMSNorm,
    nnx.GroupNorm: CompactGroupNorm,
}


def divide_by_full_count(norm: Any, path: str, full: int) -> None:
    """Make a norm that lost channels divide by the count of the full model, in place.

    Its parameters, options and place in the model stay; its class becomes one of those
    above.

    Args:
      norm: an ``nnx.LayerNorm``, ``RMSNorm`` or ``GroupNorm``.
      path: where it is, for errors.
      full: how many features it had, in a group of a GroupNorm.

    Raises:
      CompactionError: it would not be exact.
    """
    if isinstance(norm, tuple(_COMPACT.values())):
        return  # compacted before: the counts of the first full model hold
    reason = refusal(norm, centred=not isinstance(norm, nnx.RMSNorm))
    if type(norm) not in _COMPACT:
        reason = "is of a class that is not known; pass a fix to register_compact"
    if reason:
        raise CompactionError(
            f"{path}: a {type(norm).__name__} cannot lose channels exactly: it "
            f"{reason}."
        )
    object.__setattr__(norm, "__class__", _COMPACT[type(norm)])
    if isinstance(norm, CompactGroupNorm):
        norm.full_group_size = full
    else:
        norm.full_features = full


def refusal(norm: Any, *, centred: bool) -> str | None:
    """Return why a norm of ``nnx`` or Linen cannot be exact with fewer channels.

    Args:
      norm: the layer.
      centred: whether it subtracts the mean.
    """
    if norm.axis_name is not None:
        return f"averages over the mapped axis {norm.axis_name!r}"
    if centred and not norm.use_fast_variance:
        return (
            "computes the variance from differences to the mean, to which a zero "
            "channel contributes; build it with use_fast_variance=True"
        )
    feature_axes = getattr(norm, "feature_axes", -1)
    if not isinstance(feature_axes, int) and len(feature_axes) != 1:
        return f"has several feature axes, {tuple(feature_axes)}"
    return None


def averages_features(norm: Any) -> bool:
    """Tell whether a LayerNorm or RMSNorm averages over its features.

    Where some axes count from the end and others do not, it may, and is said to.
    """
    as_set = lambda axes: {axes} if isinstance(axes, int) else set(axes)
    features, reduced = as_set(norm.feature_axes), as_set(norm.reduction_axes)
    mixed = len({axis < 0 for axis in features | reduced}) > 1
    return mixed or bool(features & reduced)


def groups_left(kept: np.ndarray, full_size: int, path: str) -> tuple[int, int]:
    """Return the groups that are left of a GroupNorm, and the channels of each.

    Args:
      kept: int [n], the channels that are left.
      full_size: how many channels a group had.
      path: where the norm is, for errors.

    Raises:
      CompactionError: the groups differ in size.
    """
    groups, sizes = np.unique(kept // full_size, return_counts=True)
    if len(set(sizes.tolist())) > 1:
        raise CompactionError(
            f"{path}: the groups of a GroupNorm must keep equally many channels, got "
            f"{sizes.tolist()} of {full_size} in groups {groups.tolist()}."
        )
    return len(groups), int(sizes[0]) if len(groups) else full_size


def over_features(
    norm: Any,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    full: int,
    *,
    mask: jax.Array | None = None,
    centred: bool = True,
) -> jax.Array:
    """Compute a LayerNorm, or without a mean an RMSNorm, that had ``full`` features.

    Args:
      norm: of ``nnx`` or Linen; its axes, epsilon and dtype are used.
      x: array whose feature axis lost all but [features].
      scale: [features] or None.
      bias: [features] or None.
      full: how many features there were; ignored where x has more.
      mask: bool array that broadcasts to x, the same for all features.
      centred: whether the mean is subtracted.
    """
    axes = _resolved(norm.reduction_axes, x.ndim)
    (feature_axis,) = _resolved(norm.feature_axes, x.ndim)
    along_features = () if mask is None else mask.shape[feature_axis - x.ndim :][:1]
    if mask is not None and len(mask.shape) >= x.ndim - feature_axis:
        if along_features != (1,):
            raise CompactionError(
                f"{type(norm).__name__}(mask=...) must be the same for all features, "
                f"with size 1 along axis {feature_axis} of x, got shape {mask.shape}: "
                "what it was for features that were removed cannot be known."
            )
    full_shape = list(x.shape)
    full_shape[feature_axis] = max(full, x.shape[feature_axis])
    mean, variance = _statistics(x, axes, full_shape, norm.dtype, centred, mask)
    return _normalised(norm, x, mean, variance, scale, bias, axes, feature_axis)


def over_groups(
    norm: Any,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    left: tuple[int, int],
    full_size: int,
) -> jax.Array:
    """Compute a GroupNorm whose groups had ``full_size`` channels.

    Args:
      norm: of ``nnx`` or Linen; its axes, epsilon and dtype are used.
      x: [batch, ..., channels].
      scale: [channels] or None.
      bias: [channels] or None.
      left: how many groups are left, and how many channels of each.
      full_size: how many channels a group had.
    """
    channel = x.ndim - 1
    axes = range(1, x.ndim) if norm.reduction_axes is None else norm.reduction_axes
    axes = tuple(axis for axis in _resolved(axes, x.ndim) if axis != channel)
    grouped = x.reshape(*x.shape[:-1], *left)
    full_shape = (*grouped.shape[:-1], full_size)
    by_group = _statistics(grouped, (*axes, x.ndim), full_shape, norm.dtype)
    mean, variance = (jnp.repeat(array, left[1], axis=-1) for array in by_group)
    return _normalised(norm, x, mean, variance, scale, bias, axes, channel)


def _resolved(axes: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int) else axes
    return tuple(sorted({axis % ndim for axis in axes}))


def _statistics(x, axes, full_shape, dtype, centred=True, mask=None):
    """Return mean and variance over ``axes`` of an array that had ``full_shape``.

    All that is gone was zero. The variance is the mean of squares less the square of
    the mean: a sum of squares of differences would have seen the zeros.
    """
    x = x.astype(jnp.promote_types(dtype or x.dtype, jnp.float32))

    def mean(values):
        if mask is None:
            count = float(math.prod(full_shape[axis] for axis in axes))
        else:
            counted = jnp.broadcast_to(mask, tuple(full_shape))
            count = jnp.sum(counted, axes, dtype=values.dtype)
        return jnp.sum(values, axes, where=mask) / count

    squares = lax.square(x)
    if not centred:
        variance = mean(squares)
        return jnp.zeros_like(variance), variance
    average, mean_square = mean(x), mean(squares)
    return average, jnp.maximum(0.0, mean_square - lax.square(average))


def _normalised(norm, x, mean, variance, scale, bias, axes, feature_axis):
    reduced = [1 if axis in axes else n for axis, n in enumerate(x.shape)]
    column = [n if axis == feature_axis else 1 for axis, n in enumerate(x.shape)]
    mean, variance = mean.reshape(reduced), variance.reshape(reduced)
    y = x - mean
    factor = lax.rsqrt(variance + norm.epsilon)
    if scale is not None:
        factor = factor * scale.reshape(column)
    y = y * factor
    if bias is not None:
        y = y + bias.reshape(column)
    present = [array for array in (x, scale, bias) if array is not None]
    return y.astype(norm.dtype or jnp.result_type(*present))
