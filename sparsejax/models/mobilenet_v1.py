"""MobileNet (Howard et al. 2017, arXiv:1704.04861), images [batch, h, w, c]."""

from collections.abc import Sequence

import jax
from flax import nnx

from sparsejax.models._layers import ConvNorm, scaled_width
from sparsejax.models.resnet import Activation


class SeparableConv(nnx.Module):
    """A depthwise 3x3 and a pointwise 1x1 convolution, normalized and activated."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        strides: int,
        activation: Activation = nnx.relu,
        rngs: nnx.Rngs,
    ):
        self.depthwise = ConvNorm(
            n_in, n_in, 3, strides=strides, groups=n_in, rngs=rngs
        )
        self.pointwise = ConvNorm(n_in, n_out, 1, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [batch, h/strides, w/strides, n_out] for x [batch, h, w, n_in]."""
        return self.activation(self.pointwise(self.activation(self.depthwise(x))))


class MobileNetV1(nnx.Module):
    """One convolution, depthwise separable ones, spatial mean, linear head.

    BatchNorm follows the module's mode: call `model.train()` or `model.eval()`.

    Args:
      stem_width: channels of the first convolution.
      blocks: channels and strides of each separable convolution.
      num_classes: size of the output.
      in_channels: channels of the images.
      stem_strides: of the first convolution.
      activation: after each convolution.
      rngs: NNX random streams; `params` is used.
    """

    def __init__(
        self,
        stem_width: int,
        blocks: Sequence[tuple[int, int]],
        num_classes: int,
        *,
        in_channels: int = 3,
        stem_strides: int = 2,
        activation: Activation = nnx.relu,
        rngs: nnx.Rngs,
    ):
        self.stem = ConvNorm(
            in_channels, stem_width, 3, strides=stem_strides, rngs=rngs
        )
        self.blocks = nnx.List()
        n_in = stem_width
        for n_out, strides in blocks:
            self.blocks.append(
                SeparableConv(
                    n_in, n_out, strides=strides, activation=activation, rngs=rngs
                )
            )
            n_in = n_out
        self.head = nnx.Linear(n_in, num_classes, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits [batch, num_classes] for images [batch, h, w, in_channels]."""
        x = self.activation(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


_BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)


def mobilenet_v1(
    num_classes: int = 1000,
    *,
    width_multiplier: float = 1.0,
    in_channels: int = 3,
    stem_strides: int = 2,
    activation: Activation = nnx.relu,
    rngs: nnx.Rngs,
) -> MobileNetV1:
    """Build the network of the paper's Table 1: 4,231,976 parameters for ImageNet.

    Args:
      num_classes: size of the output.
      width_multiplier: factor on all channels, which are rounded to multiples of 8.
      in_channels: channels of the images.
      stem_strides: of the first convolution; 1 is usual for CIFAR, whose images then
        end as 2x2.
      activation: in place of every ReLU.
      rngs: NNX random streams; `params` is used.

    Example:
      >>> from flax import nnx
      >>> from sparsejax import models
      >>> model = nnx.eval_shape(lambda: models.mobilenet_v1(rngs=nnx.Rngs(0)))
      >>> len(model.blocks), model.head.kernel.shape
      (13, (1024, 1000))
    """
    return MobileNetV1(
        scaled_width(32, width_multiplier),
        [(scaled_width(n_out, width_multiplier), s) for n_out, s in _BLOCKS],
        num_classes,
        in_channels=in_channels,
        stem_strides=stem_strides,
        activation=activation,
        rngs=rngs,
    )
