"""Residual networks (He et al. 2016, arXiv:1512.03385), images [batch, h, w, channels].

A network is a stem, stages of residual blocks, and a linear head over the spatial
mean. `ResNet` is given the classes of the stem and of the block.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

# He et al. 2015 (arXiv:1502.01852), for layers that a ReLU follows.
_conv_init = nnx.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


def _conv(n_in: int, n_out: int, size: int, strides: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        n_in,
        n_out,
        (size, size),
        strides=strides,
        padding=[(size // 2, size // 2)] * 2,
        use_bias=False,
        kernel_init=_conv_init,
        rngs=rngs,
    )


_norm = partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5)


class CifarStem(nnx.Module):
    """One 3x3 convolution with BatchNorm and ReLU: small images keep their size."""

    def __init__(self, n_in: int, n_out: int, *, rngs: nnx.Rngs):
        self.conv = _conv(n_in, n_out, 3, 1, rngs)
        self.norm = _norm(n_out, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [batch, h, w, n_out] for x [batch, h, w, n_in]."""
        return nnx.relu(self.norm(self.conv(x)))


class Projection(nnx.Module):
    """Shortcut B: a 1x1 convolution with BatchNorm."""

    def __init__(self, n_in: int, n_out: int, strides: int, *, rngs: nnx.Rngs):
        self.conv = _conv(n_in, n_out, 1, strides, rngs)
        self.norm = _norm(n_out, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [batch, h/strides, w/strides, n_out] for x [batch, h, w, n_in]."""
        return self.norm(self.conv(x))


class Padding(nnx.Module):
    """Shortcut A: every `strides`-th pixel and zeros for new channels; no weights."""

    def __init__(self, n_in: int, n_out: int, strides: int):
        self.new_channels = n_out - n_in
        self.strides = strides

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [batch, h/strides, w/strides, n_out] for x [batch, h, w, n_in]."""
        x = x[:, :: self.strides, :: self.strides]
        before = self.new_channels // 2
        after = self.new_channels - before
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, after)))


def _shortcut(kind: str, n_in: int, n_out: int, strides: int, rngs: nnx.Rngs):
    """Build what adds a block's input to its output; None where shapes agree."""
    if n_in == n_out and strides == 1:
        return None
    if kind == "projection":
        return Projection(n_in, n_out, strides, rngs=rngs)
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
        self, n_in: int, width: int, *, strides: int, shortcut: str, rngs: nnx.Rngs
    ):
        self.conv1 = _conv(n_in, width, 3, strides, rngs)
        self.norm1 = _norm(width, rngs=rngs)
        self.conv2 = _conv(width, width, 3, 1, rngs)
        self.norm2 = _norm(width, rngs=rngs)
        self.shortcut = _shortcut(shortcut, n_in, width, strides, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [batch, h/strides, w/strides, width] for x [batch, h, w, n_in]."""
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    """Stem, stages of residual blocks, spatial mean, linear head.

    The first block of every stage but the first halves the image. BatchNorm follows
    the module's mode: call `model.train()` or `model.eval()`.

    Args:
      stage_sizes: blocks in each stage.
      widths: channels of each stage; the stem has `widths[0]`.
      num_classes: size of the output.
      in_channels: channels of the images.
      block: the residual block.
      stem: makes the first layers from (in_channels, widths[0], rngs=rngs).
      shortcut: "projection" (1x1 convolution) or "padding" (subsample and pad).
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
        block: type[BasicBlock] = BasicBlock,
        stem: Callable[..., nnx.Module] = CifarStem,
        shortcut: str = "projection",
        rngs: nnx.Rngs,
    ):
        if len(stage_sizes) != len(widths):
            raise ValueError(
                "ResNet needs one width for each stage, got "
                f"stage_sizes={tuple(stage_sizes)} and widths={tuple(widths)}."
            )
        self.stem = stem(in_channels, widths[0], rngs=rngs)
        self.blocks = nnx.List()
        n_in = widths[0]
        for stage, (size, width) in enumerate(zip(stage_sizes, widths, strict=True)):
            for index in range(size):
                strides = 2 if stage > 0 and index == 0 else 1
                self.blocks.append(
                    block(n_in, width, strides=strides, shortcut=shortcut, rngs=rngs)
                )
                n_in = width * block.expansion
        self.head = nnx.Linear(n_in, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits [batch, num_classes] for images [batch, h, w, in_channels]."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


def resnet_cifar(
    depth: int,
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    width: int = 16,
    shortcut: str = "projection",
    rngs: nnx.Rngs,
) -> ResNet:
    """Build the three-stage CIFAR network of depth 6n+2 (20, 32, 44, 56, 110).

    ResNet-20 on CIFAR-10 has 272,474 parameters with projections and 269,722 with
    the parameter-free shortcuts of the paper's section 4.2. Depth 8 is a network
    for tests and small machines; images of 28x28 and 32x32 both work.

    Args:
      depth: 6n+2 layers with weights, shortcuts not counted.
      num_classes: size of the output.
      in_channels: channels of the images.
      width: channels of the first stage, doubled in the second and in the third.
      shortcut: "projection" or "padding".
      rngs: NNX random streams; `params` is used.

    Raises:
      ValueError: where depth is not 6n+2 with n >= 1.
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
        shortcut=shortcut,
        rngs=rngs,
    )
