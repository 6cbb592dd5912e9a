"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381), images [batch, h, w, c]."""

from collections.abc import Sequence

import jax
from flax import nnx

from sparsejax.models._layers import ConvNorm, scaled_width
from sparsejax.models.resnet import Activation


class InvertedResidual(nnx.Module):
    """Expand, convolve each channel for itself, project without an activation.

    Each of the three has BatchNorm, and the first two an activation. The input is added
    where shapes agree. Without expansion there is no first convolution.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        strides: int,
        expansion: int,
        activation: Activation = nnx.relu6,
        rngs: nnx.Rngs,
    ):
        width = expansion * n_in
        self.expand = ConvNorm(n_in, width, 1, rngs=rngs) if expansion > 1 else None
        self.depthwise = ConvNorm(
            width, width, 3, strides=strides, groups=width, rngs=rngs
        )
        self.project = ConvNorm(width, n_out, 1, rngs=rngs)
        self.is_residual = strides == 1 and n_in == n_out
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [batch, h/strides, w/strides, n_out] for x [batch, h, w, n_in]."""
        y = x if self.expand is None else self.activation(self.expand(x))
        y = self.project(self.activation(self.depthwise(y)))
        return x + y if self.is_residual else y


class MobileNetV2(nnx.Module):
    """One convolution, inverted residuals, a wide 1x1 convolution, mean, linear head.

    BatchNorm follows the module's mode: call `model.train()` or `model.eval()`.

    Args:
      stem_width: channels of the first convolution.
      stages: expansion, channels, blocks and strides of each stage; the strides are
        those of its first block.
      last_width: channels of the last convolution.
      num_classes: size of the output.
      in_channels: channels of the images.
      stem_strides: of the first convolution.
      activation: after each convolution but the projections.
      rngs: NNX random streams; `params` is used.
    """

    def __init__(
        self,
        stem_width: int,
        stages: Sequence[tuple[int, int, int, int]],
        last_width: int,
        num_classes: int,
        *,
        in_channels: int = 3,
        stem_strides: int = 2,
        activation: Activation = nnx.relu6,
        rngs: nnx.Rngs,
    ):
        self.stem = ConvNorm(
            in_channels, stem_width, 3, strides=stem_strides, rngs=rngs
        )
        self.blocks = nnx.List()
        n_in = stem_width
        for expansion, n_out, size, strides in stages:
            for index in range(size):
                self.blocks.append(
                    InvertedResidual(
                        n_in,
                        n_out,
                        strides=strides if index == 0 else 1,
                        expansion=expansion,
                        activation=activation,
                        rngs=rngs,
                    )
                )
                n_in = n_out
        self.last = ConvNorm(n_in, last_width, 1, rngs=rngs)
        self.head = nnx.Linear(last_width, num_classes, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits [batch, num_classes] for images [batch, h, w, in_channels]."""
        x = self.activation(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(self.activation(self.last(x)).mean(axis=(1, 2)))


_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet_v2(
    num_classes: int = 1000,
    *,
    width_multiplier: float = 1.0,
    in_channels: int = 3,
    stem_strides: int = 2,
    activation: Activation = nnx.relu6,
    rngs: nnx.Rngs,
) -> MobileNetV2:
    """Build the network of the paper's Table 2: 3,504,872 parameters for ImageNet.

    Args:
      num_classes: size of the output.
      width_multiplier: factor on all channels, which are rounded to multiples of 8;
        the last convolution has 1280 at least.
      in_channels: channels of the images.
      stem_strides: of the first convolution; 1 is usual for CIFAR, whose images then
        end as 2x2.
      activation: in place of every ReLU6.
      rngs: NNX random streams; `params` is used.

    Example:
      >>> from flax import nnx
      >>> from sparsejax import models
      >>> model = nnx.eval_shape(lambda: models.mobilenet_v2(rngs=nnx.Rngs(0)))
      >>> len(model.blocks), model.head.kernel.shape
      (17, (1280, 1000))
    """
    stages = [
        (expansion, scaled_width(n_out, width_multiplier), size, strides)
        for expansion, n_out, size, strides in _STAGES
    ]
    return MobileNetV2(
        scaled_width(32, width_multiplier),
        stages,
        scaled_width(1280, max(1.0, width_multiplier)),
        num_classes,
        in_channels=in_channels,
        stem_strides=stem_strides,
        activation=activation,
        rngs=rngs,
    )
