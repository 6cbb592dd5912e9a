"""VGG with BatchNorm (Simonyan, Zisserman 2015, arXiv:1409.1556).

Images [batch, h, w, channels] pass stages of 3x3 convolutions, each stage ending in a
2x2 maximum, and what is left of them a multi-layer perceptron. The convolutions have
biases, although BatchNorm follows: the published networks have them, and their
parameters are counted with them.
"""

from collections.abc import Sequence

import jax
from flax import nnx

from sparsejax.models._layers import ConvNorm
from sparsejax.models.mlp import MLP
from sparsejax.models.resnet import Activation


class VGG(nnx.Module):
    """Stages of convolutions, each halving the image, and a perceptron.

    BatchNorm and dropout follow the module's mode: call `model.train()` or
    `model.eval()`.

    Args:
      stage_sizes: convolutions in each stage.
      widths: channels of each stage.
      num_classes: size of the output.
      image_size: height and width of the images.
      hidden: sizes of the perceptron's hidden layers.
      in_channels: channels of the images.
      dropout_rate: of the hidden layers.
      activation: after each convolution.
      rngs: NNX random streams; `params` is used, and `dropout` where there is a rate.

    Raises:
      ValueError: where `stage_sizes` and `widths` differ in length, or the stages
        leave nothing of the image.
    """

    def __init__(
        self,
        stage_sizes: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        *,
        image_size: int,
        hidden: Sequence[int] = (),
        in_channels: int = 3,
        dropout_rate: float = 0.0,
        activation: Activation = nnx.relu,
        rngs: nnx.Rngs,
    ):
        if len(stage_sizes) != len(widths):
            raise ValueError(
                "VGG needs one width for each stage, got "
                f"stage_sizes={tuple(stage_sizes)} and widths={tuple(widths)}."
            )
        pixels = (image_size // 2 ** len(stage_sizes)) ** 2
        if not pixels:
            raise ValueError(
                f"VGG(image_size=...) must be at least {2 ** len(stage_sizes)}, which "
                f"{len(stage_sizes)} stages halve to 1, got {image_size}."
            )
        self.stages = nnx.List()
        n_in = in_channels
        for size, width in zip(stage_sizes, widths, strict=True):
            channels = (n_in, *(width,) * size)
            self.stages.append(
                nnx.List(
                    ConvNorm(before, after, 3, use_bias=True, rngs=rngs)
                    for before, after in zip(channels[:-1], channels[1:], strict=True)
                )
            )
            n_in = width
        self.head = MLP(
            n_in * pixels, hidden, num_classes, dropout_rate=dropout_rate, rngs=rngs
        )
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits [batch, num_classes] for images [batch, h, w, in_channels]."""
        for stage in self.stages:
            for layer in stage:
                x = self.activation(layer(x))
            x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        return self.head(x)


_WIDTHS = (64, 128, 256, 512, 512)
_DEPTHS = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


def _stage_sizes(factory: str, depth: int) -> tuple[int, ...]:
    if depth not in _DEPTHS:
        raise ValueError(
            f"{factory}(depth=...) must be one of {list(_DEPTHS)}, got {depth}."
        )
    return _DEPTHS[depth]


def vgg(
    depth: int,
    num_classes: int = 1000,
    *,
    image_size: int = 224,
    in_channels: int = 3,
    dropout_rate: float = 0.0,
    activation: Activation = nnx.relu,
    rngs: nnx.Rngs,
) -> VGG:
    """Build the network for ImageNet, with a perceptron of three layers.

    VGG-16 has 138,365,992 parameters and VGG-19 143,678,248.

    Args:
      depth: 11, 13, 16 or 19.
      num_classes: size of the output.
      image_size: height and width of the images.
      in_channels: channels of the images.
      dropout_rate: of the two hidden layers of 4096; the paper's is 0.5.
      activation: after each convolution.
      rngs: NNX random streams; `params` is used, and `dropout` where there is a rate.

    Raises:
      ValueError: where there is no such depth, or the image is smaller than 32.

    Example:
      >>> from flax import nnx
      >>> from sparsejax import models
      >>> model = nnx.eval_shape(lambda: models.vgg(16, rngs=nnx.Rngs(0)))
      >>> [layer.kernel.shape for layer in model.head.layers]
      [(25088, 4096), (4096, 4096), (4096, 1000)]
    """
    return VGG(
        _stage_sizes("vgg", depth),
        _WIDTHS,
        num_classes,
        image_size=image_size,
        hidden=(4096, 4096),
        in_channels=in_channels,
        dropout_rate=dropout_rate,
        activation=activation,
        rngs=rngs,
    )


def vgg_cifar(
    depth: int,
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    activation: Activation = nnx.relu,
    rngs: nnx.Rngs,
) -> VGG:
    """Build the network for 32x32 images, with one linear layer on 512 channels.

    It is what the literature on pruning trains on CIFAR. VGG-16 has 14,728,266
    parameters for 10 classes.

    Args:
      depth: 11, 13, 16 or 19, as if there were three linear layers.
      num_classes: size of the output.
      in_channels: channels of the images.
      activation: after each convolution.
      rngs: NNX random streams; `params` is used.

    Raises:
      ValueError: where there is no such depth.

    Example:
      >>> from flax import nnx
      >>> from sparsejax import models
      >>> model = nnx.eval_shape(lambda: models.vgg_cifar(16, rngs=nnx.Rngs(0)))
      >>> [layer.kernel.shape for layer in model.head.layers]
      [(512, 10)]
    """
    return VGG(
        _stage_sizes("vgg_cifar", depth),
        _WIDTHS,
        num_classes,
        image_size=32,
        in_channels=in_channels,
        activation=activation,
        rngs=rngs,
    )
