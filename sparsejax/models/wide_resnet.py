"""Wide residual networks (Zagoruyko, Komodakis 2016, arXiv:1605.07146).

They normalize and activate before a convolution, not after it (He et al. 2016b,
arXiv:1603.05027), so that nothing stands on the way of a sum to the next.
"""

from collections.abc import Sequence

import jax
from flax import nnx

from sparsejax.models._layers import conv, norm


class PreActivationBlock(nnx.Module):
    """Two 3x3 convolutions, BatchNorm and ReLU before each, beside a shortcut.

    The shortcut is the input, or, where shapes change, a 1x1 convolution of the
    normalized and activated input.
    """

    def __init__(
        self,
        n_in: int,
        width: int,
        *,
        strides: int,
        dropout_rate: float,
        rngs: nnx.Rngs,
    ):
        self.norm1 = norm(n_in, rngs=rngs)
        self.conv1 = conv(n_in, width, 3, strides=strides, rngs=rngs)
        self.norm2 = norm(width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs if dropout_rate else None)
        self.conv2 = conv(width, width, 3, rngs=rngs)
        reshapes = n_in != width or strides != 1
        self.shortcut = (
            conv(n_in, width, 1, strides=strides, rngs=rngs) if reshapes else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [batch, h/strides, w/strides, width] for x [batch, h, w, n_in]."""
        activated = nnx.relu(self.norm1(x))
        y = nnx.relu(self.norm2(self.conv1(activated)))
        y = self.conv2(self.dropout(y))
        return y + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nnx.Module):
    """One convolution, stages of pre-activation blocks, spatial mean, linear head.

    The first block of every stage but the first halves the image. BatchNorm and
    dropout follow the module's mode: call `model.train()` or `model.eval()`.

    Args:
      stage_size: blocks in each stage.
      stem_width: channels of the first convolution.
      widths: channels of each stage.
      num_classes: size of the output.
      in_channels: channels of the images.
      dropout_rate: between the two convolutions of a block.
      rngs: NNX random streams; `params` is used, and `dropout` where there is a rate.
    """

    def __init__(
        self,
        stage_size: int,
        stem_width: int,
        widths: Sequence[int],
        num_classes: int,
        *,
        in_channels: int = 3,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.stem = conv(in_channels, stem_width, 3, rngs=rngs)
        self.blocks = nnx.List()
        n_in = stem_width
        for stage, width in enumerate(widths):
            for index in range(stage_size):
                self.blocks.append(
                    PreActivationBlock(
                        n_in,
                        width,
                        strides=2 if stage > 0 and index == 0 else 1,
                        dropout_rate=dropout_rate,
                        rngs=rngs,
                    )
                )
                n_in = width
        self.norm = norm(n_in, rngs=rngs)
        self.head = nnx.Linear(n_in, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits [batch, num_classes] for images [batch, h, w, in_channels]."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(nnx.relu(self.norm(x)).mean(axis=(1, 2)))


def wide_resnet(
    depth: int,
    widen: int,
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    dropout_rate: float = 0.0,
    rngs: nnx.Rngs,
) -> WideResNet:
    """Build WRN-depth-widen for CIFAR, as WRN-22-2 and WRN-28-10.

    WRN-22-2 has 1,079,642 parameters for 10 classes; SRigL (arXiv:2305.02299) trains
    it with a dropout rate of 0.3. "WRN-32-2" of Structure-LTH is no such network: see
    `resnet_cifar`.

    Args:
      depth: 6n+4 layers with weights, one shortcut a stage among them.
      widen: factor on the channels 16, 32 and 64 of the stages.
      num_classes: size of the output.
      in_channels: channels of the images.
      dropout_rate: between the two convolutions of a block.
      rngs: NNX random streams; `params` is used, and `dropout` where there is a rate.

    Raises:
      ValueError: where depth is not 6n+4 with n >= 1.

    Example:
      >>> from flax import nnx
      >>> from sparsejax import models
      >>> model = nnx.eval_shape(lambda: models.wide_resnet(22, 2, rngs=nnx.Rngs(0)))
      >>> len(model.blocks), model.head.kernel.shape
      (9, (128, 10))
    """
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1:
        raise ValueError(
            f"wide_resnet(depth=...) must be 6n+4 (10, 16, 22, 28, ...), got {depth}; "
            "for networks of depth 6n+2 use resnet_cifar with a larger width."
        )
    return WideResNet(
        blocks,
        16,
        (16 * widen, 32 * widen, 64 * widen),
        num_classes,
        in_channels=in_channels,
        dropout_rate=dropout_rate,
        rngs=rngs,
    )
