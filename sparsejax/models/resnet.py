"""Residual networks (He et al. 2016, arXiv:1512.03385), images [batch, h, w, channels].

A network is a stem, stages of residual blocks, and a linear head over the spatial
mean. `ResNet` is given the classes of the stem and of the block.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.models._layers import ConvNorm, conv, norm

Activation = Callable[[jax.Array], jax.Array]


class CifarStem(nnx.Module):
    """One 3x3 convolution with BatchNorm: small images keep their size by default."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        strides: int = 1,
        activation: Activation,
        rngs: nnx.Rngs,
    ):
        self.conv = conv(n_in, n_out, 3, strides=strides, rngs=rngs)
        self.norm = norm(n_out, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [batch, h/strides, w/strides, n_out] for x [batch, h, w, n_in]."""
        return self.activation(self.norm(self.conv(x)))


class ImagenetStem(nnx.Module):
    """A 7x7 convolution with BatchNorm and a 3x3 maximum, each of strides 2."""

    def __init__(
        self, n_in: int, n_out: int, *, activation: Activation, rngs: nnx.Rngs
    ):
        self.conv = conv(n_in, n_out, 7, strides=2, rngs=rngs)
        self.norm = norm(n_out, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [batch, h/4, w/4, n_out] for x [batch, h, w, n_in]."""
        x = self.activation(self.norm(self.conv(x)))
        padding: Any = [(1, 1), (1, 1)]
        return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=padding)


class Padding(nnx.Module):
    """Shortcut A: every `strides`-th pixel and zeros for new channels; no weights."""

    def __init__(self, n_in: int, n_out: int, strides: int):
        self.before = (n_out - n_in) // 2
        self.after = n_out - n_in - self.before
        self.strides = strides

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [batch, h/strides, w/strides, n_out] for x [batch, h, w, n_in]."""
        x = x[:, :: self.strides, :: self.strides]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (self.before, self.after)))


def _shortcut(kind: str, n_in: int, n_out: int, strides: int, rngs: nnx.Rngs):
    """Build what adds a block's input to its output; None where shapes agree."""
    if n_in == n_out and strides == 1:
        return None
    if kind == "projection":  # shortcut B of the paper
        return ConvNorm(n_in, n_out, 1, strides=strides, rngs=rngs)
    if kind == "padding":
        return Padding(n_in, n_out, strides)
    raise ValueError(
        f"ResNet(shortcut=...) must be 'projection' or 'padding', got {kind!r}."
    )


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions, each with BatchNorm, beside a shortcut.

    It ends with `width * expansion` channels.
    """

    expansion = 1

    def __init__(
        self,
        n_in: int,
        width: int,
        *,
        strides: int,
        shortcut: str,
        activation: Activation,
        rngs: nnx.Rngs,
    ):
        self.conv1 = ConvNorm(n_in, width, 3, strides=strides, rngs=rngs)
        self.conv2 = ConvNorm(width, width, 3, rngs=rngs)
        self.shortcut = _shortcut(shortcut, n_in, width, strides, rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [batch, h/strides, w/strides, width] for x [batch, h, w, n_in]."""
        y = self.conv2(self.activation(self.conv1(x)))
        return self.activation(y + (x if self.shortcut is None else self.shortcut(x)))


class Bottleneck(nnx.Module):
    """Convolutions 1x1, 3x3 and 1x1, each with BatchNorm, beside a shortcut.

    The strides are on the 3x3 convolution ("ResNet v1.5", as in torchvision), where
    the paper has them on the first; that costs 6 % more operations in a ResNet-50 and
    no parameters. It ends with `width * expansion` channels.
    """

    expansion = 4

    def __init__(
        self,
        n_in: int,
        width: int,
        *,
        strides: int,
        shortcut: str,
        activation: Activation,
        rngs: nnx.Rngs,
    ):
        n_out = width * self.expansion
        self.conv1 = ConvNorm(n_in, width, 1, rngs=rngs)
        self.conv2 = ConvNorm(width, width, 3, strides=strides, rngs=rngs)
        self.conv3 = ConvNorm(width, n_out, 1, rngs=rngs)
        self.shortcut = _shortcut(shortcut, n_in, n_out, strides, rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [batch, h/strides, w/strides, 4 width] for x [batch, h, w, n_in]."""
        y = self.activation(self.conv1(x))
        y = self.conv3(self.activation(self.conv2(y)))
        return self.activation(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    """Stem, stages of residual blocks, spatial mean, linear head.

    The first block of every stage but the first halves the image. BatchNorm follows
    the module's mode: call `model.train()` or `model.eval()`.

    Args:
      stage_sizes: blocks in each stage.
      widths: channels of each stage, before a block's expansion; the stem has
        `widths[0]`.
      num_classes: size of the output.
      in_channels: channels of the images.
      block: the residual block.
      stem: makes the first layers from (in_channels, widths[0]).
      shortcut: "projection" (1x1 convolution) or "padding" (subsample and pad).
      activation: after the stem, within blocks and after their sums.
      rngs: NNX random streams; `params` is used.

    Raises:
      ValueError: where `stage_sizes` and `widths` differ in length, or `shortcut` is
        neither of the two.
    """

    def __init__(
        self,
        stage_sizes: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        *,
        in_channels: int = 3,
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
        stem: Callable[..., nnx.Module] = CifarStem,
        shortcut: str = "projection",
        activation: Activation = nnx.relu,
        rngs: nnx.Rngs,
    ):
        if len(stage_sizes) != len(widths):
            raise ValueError(
                "ResNet needs one width for each stage, got "
                f"stage_sizes={tuple(stage_sizes)} and widths={tuple(widths)}."
            )
        self.stem = stem(in_channels, widths[0], activation=activation, rngs=rngs)
        self.blocks = nnx.List()
        n_in = widths[0]
        for stage, (size, width) in enumerate(zip(stage_sizes, widths, strict=True)):
            for index in range(size):
                self.blocks.append(
                    block(
                        n_in,
                        width,
                        strides=2 if stage > 0 and index == 0 else 1,
                        shortcut=shortcut,
                        activation=activation,
                        rngs=rngs,
                    )
                )
                n_in = width * block.expansion
        self.head = nnx.Linear(n_in, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits [batch, num_classes] for images [batch, h, w, in_channels]."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


_STEMS = {"cifar": CifarStem, "imagenet": ImagenetStem}
_DEPTHS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


def resnet(
    depth: int,
    num_classes: int = 1000,
    *,
    stem: str = "imagenet",
    in_channels: int = 3,
    width: int = 64,
    activation: Activation = nnx.relu,
    rngs: nnx.Rngs,
) -> ResNet:
    """Build the four-stage network of depth 18, 34, 50, 101 or 152.

    For ImageNet they have 11,689,512, 21,797,672, 25,557,032, 44,549,160 and
    60,192,808 parameters.

    Args:
      depth: layers with weights, shortcuts not counted.
      num_classes: size of the output.
      stem: "imagenet" divides the image's size by four; "cifar" is one 3x3
        convolution and keeps it.
      in_channels: channels of the images.
      width: channels of the first stage, doubled in each that follows.
      activation: in place of every ReLU.
      rngs: NNX random streams; `params` is used.

    Raises:
      ValueError: where there is no such depth or stem.

    Example:
      >>> from flax import nnx
      >>> from sparsejax import models
      >>> model = nnx.eval_shape(lambda: models.resnet(50, rngs=nnx.Rngs(0)))
      >>> len(model.blocks), model.head.kernel.shape
      (16, (2048, 1000))
    """
    if depth not in _DEPTHS:
        raise ValueError(
            f"resnet(depth=...) must be one of {list(_DEPTHS)}, got {depth}; for the "
            "three-stage networks of depth 6n+2 use resnet_cifar."
        )
    if stem not in _STEMS:
        raise ValueError(
            f"resnet(stem=...) must be one of {list(_STEMS)}, got {stem!r}."
        )
    block, stage_sizes = _DEPTHS[depth]
    return ResNet(
        stage_sizes,
        [width * 2**stage for stage in range(4)],
        num_classes,
        in_channels=in_channels,
        block=block,
        stem=_STEMS[stem],
        activation=activation,
        rngs=rngs,
    )


def resnet_cifar(
    depth: int,
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    width: int = 16,
    stem_strides: int = 1,
    shortcut: str = "projection",
    activation: Activation = nnx.relu,
    rngs: nnx.Rngs,
) -> ResNet:
    """Build the three-stage CIFAR network of depth 6n+2 (20, 32, 44, 56, 110).

    ResNet-20 on CIFAR-10 has 272,474 parameters with projections and 269,722 with
    the parameter-free shortcuts of the paper's section 4.2. Depth 8 is a network
    for tests and small machines; images of 28x28 and 32x32 both work. Depth 32 of
    width 32 is what Structure-LTH (arXiv:2202.04736) calls WRN-32-2: 1,860,522
    parameters.

    Args:
      depth: 6n+2 layers with weights, shortcuts not counted.
      num_classes: size of the output.
      in_channels: channels of the images.
      width: channels of the first stage, doubled in the second and in the third.
      stem_strides: 2 halves the image before the first stage, which makes the network
        four times cheaper.
      shortcut: "projection" or "padding".
      activation: in place of every ReLU.
      rngs: NNX random streams; `params` is used.

    Raises:
      ValueError: where depth is not 6n+2 with n >= 1.

    Example:
      >>> from flax import nnx
      >>> from sparsejax import models
      >>> model = nnx.eval_shape(lambda: models.resnet_cifar(20, rngs=nnx.Rngs(0)))
      >>> len(model.blocks), model.head.kernel.shape
      (9, (64, 10))
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(
            f"resnet_cifar(depth=...) must be 6n+2 (8, 14, 20, 32, ...), got {depth}."
        )
    return ResNet(
        (blocks,) * 3,
        (width, 2 * width, 4 * width),
        num_classes,
        in_channels=in_channels,
        stem=functools.partial(CifarStem, strides=stem_strides),
        shortcut=shortcut,
        activation=activation,
        rngs=rngs,
    )
