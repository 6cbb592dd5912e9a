"""The convolution, its initialization and its BatchNorm, for all networks."""

from typing import Any

import jax
from flax import nnx


def conv(
    n_in: int,
    n_out: int,
    size: int,
    *,
    strides: int = 1,
    groups: int = 1,
    use_bias: bool = False,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Build a convolution that keeps the image's size but for its strides.

    The padding is symmetric, and the weights are those of He et al. 2015
    (arXiv:1502.01852) for layers that a ReLU follows: of variance 2 over the number
    of outputs that an input reaches.

    Args:
      n_in: channels of the input.
      n_out: channels of the output.
      size: height and width of the kernel.
      strides: pixels from one output to the next.
      groups: of the channels; an output sees the inputs of its group.
      use_bias: whether a bias is added.
      rngs: NNX random streams; `params` is used.
    """
    return nnx.Conv(
        n_in,
        n_out,
        (size, size),
        strides=strides,
        padding=[(size // 2, size // 2)] * 2,
        feature_group_count=groups,
        use_bias=use_bias,
        kernel_init=nnx.initializers.variance_scaling(
            2.0 * groups, "fan_out", "truncated_normal"
        ),
        rngs=rngs,
    )


def norm(n_features: int, *, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Build a BatchNorm."""
    return nnx.BatchNorm(n_features, momentum=0.9, epsilon=1e-5, rngs=rngs)


class ConvNorm(nnx.Module):
    """A convolution and its BatchNorm.

    Args:
      n_in: channels of the input.
      n_out: channels of the output.
      size: height and width of the kernel.
      rngs: NNX random streams; `params` is used.
      **options: `strides`, `groups` and `use_bias` of `conv`.
    """

    def __init__(
        self, n_in: int, n_out: int, size: int, *, rngs: nnx.Rngs, **options: Any
    ):
        self.conv = conv(n_in, n_out, size, rngs=rngs, **options)
        self.norm = norm(n_out, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [batch, h/strides, w/strides, n_out] for x [batch, h, w, n_in]."""
        return self.norm(self.conv(x))


def scaled_width(width: int, multiplier: float) -> int:
    """Round `width * multiplier` to a multiple of 8, and down by no more than 10 %."""
    scaled = width * multiplier
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded
