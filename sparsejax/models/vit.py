"""Vision transformers (Dosovitskiy et al. 2021, arXiv:2010.11929)."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

_norm = partial(nnx.LayerNorm, epsilon=1e-6)
_init = nnx.initializers.xavier_uniform()


class EncoderBlock(nnx.Module):
    """Self-attention and a perceptron with GELU, each on the LayerNorm of its input.

    Both are added to their inputs.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_width: int,
        *,
        dropout_rate: float,
        rngs: nnx.Rngs,
    ):
        self.norm1 = _norm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads, width, kernel_init=_init, decode=False, rngs=rngs
        )
        self.norm2 = _norm(width, rngs=rngs)
        self.linear1 = nnx.Linear(width, mlp_width, kernel_init=_init, rngs=rngs)
        self.linear2 = nnx.Linear(mlp_width, width, kernel_init=_init, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs if dropout_rate else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [batch, tokens, width] for x [batch, tokens, width]."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        hidden = nnx.gelu(self.linear1(self.norm2(x)), approximate=False)
        return x + self.dropout(self.linear2(self.dropout(hidden)))


class ViT(nnx.Module):
    """Patches and a class token, with learned positions, through encoder blocks.

    The head reads the LayerNorm of the class token. Its weights are random at first,
    not zeros as in the paper's code: zeros have no saliency and no magnitude to rank.
    Class and position embeddings are named so that no algorithm makes them sparse.
    Dropout follows the module's mode: call `model.train()` or `model.eval()`.

    Args:
      image_size: height and width of the images.
      patch_size: height and width of a patch.
      width: features of a token.
      depth: encoder blocks.
      num_heads: heads of the attention; they share `width`.
      mlp_width: hidden features of a block's perceptron.
      num_classes: size of the output.
      in_channels: channels of the images.
      dropout_rate: of the embeddings and of every dense layer but queries, keys and
        values, as in the paper's appendix B.1.
      rngs: NNX random streams; `params` is used, and `dropout` where there is a rate.

    Raises:
      ValueError: where patches do not tile the image, or heads do not share `width`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from sparsejax import models
      >>> @nnx.jit
      ... def logits(images):
      ...     vit = models.ViT(
      ...         image_size=32, patch_size=8, width=24, depth=2, num_heads=3,
      ...         mlp_width=48, num_classes=10, rngs=nnx.Rngs(0),
      ...     )
      ...     return vit(images)
      >>> jax.eval_shape(logits, jnp.zeros((5, 32, 32, 3))).shape
      (5, 10)
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_width: int,
        num_classes: int,
        in_channels: int = 3,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        if image_size % patch_size:
            raise ValueError(
                "ViT(image_size=...) must be a multiple of patch_size, got "
                f"image_size={image_size} and patch_size={patch_size}."
            )
        if width % num_heads:
            raise ValueError(
                "ViT(width=...) must be a multiple of num_heads, got "
                f"width={width} and num_heads={num_heads}."
            )
        tokens = (image_size // patch_size) ** 2 + 1
        self.patches = nnx.Conv(
            in_channels,
            width,
            (patch_size, patch_size),
            strides=patch_size,
            padding="VALID",
            rngs=rngs,
        )
        self.class_embedding = nnx.Param(jnp.zeros((1, 1, width)))
        self.position_embedding = nnx.Param(
            nnx.initializers.normal(0.02)(rngs.params(), (1, tokens, width))
        )
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs if dropout_rate else None)
        self.blocks = nnx.List(
            EncoderBlock(
                width, num_heads, mlp_width, dropout_rate=dropout_rate, rngs=rngs
            )
            for _ in range(depth)
        )
        self.norm = _norm(width, rngs=rngs)
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits [batch, num_classes] for images [batch, h, w, in_channels]."""
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        first = jnp.broadcast_to(
            self.class_embedding[...], (x.shape[0], 1, x.shape[-1])
        )
        x = jnp.concatenate([first, x], axis=1)
        x = self.dropout(x + self.position_embedding[...])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def vit_s16(
    num_classes: int = 1000,
    *,
    image_size: int = 224,
    dropout_rate: float = 0.0,
    rngs: nnx.Rngs,
) -> ViT:
    """Build ViT-S/16 (Touvron et al. 2021, arXiv:2012.12877): 22,050,664 parameters.

    Args:
      num_classes: size of the output.
      image_size: height and width of the images, a multiple of 16.
      dropout_rate: as for `ViT`.
      rngs: NNX random streams; `params` is used, and `dropout` where there is a rate.

    Raises:
      ValueError: where patches do not tile the image.

    Example:
      >>> from flax import nnx
      >>> from sparsejax import models
      >>> model = nnx.eval_shape(lambda: models.vit_s16(rngs=nnx.Rngs(0)))
      >>> model.position_embedding.shape, model.head.kernel.shape
      ((1, 197, 384), (384, 1000))
    """
    return ViT(
        image_size=image_size,
        patch_size=16,
        width=384,
        depth=12,
        num_heads=6,
        mlp_width=1536,
        num_classes=num_classes,
        dropout_rate=dropout_rate,
        rngs=rngs,
    )


def vit_b16(
    num_classes: int = 1000,
    *,
    image_size: int = 224,
    dropout_rate: float = 0.0,
    rngs: nnx.Rngs,
) -> ViT:
    """Build ViT-B/16 (Table 1 of the paper): 86,567,656 parameters.

    Args:
      num_classes: size of the output.
      image_size: height and width of the images, a multiple of 16.
      dropout_rate: as for `ViT`.
      rngs: NNX random streams; `params` is used, and `dropout` where there is a rate.

    Raises:
      ValueError: where patches do not tile the image.

    Example:
      >>> from flax import nnx
      >>> from sparsejax import models
      >>> model = nnx.eval_shape(lambda: models.vit_b16(rngs=nnx.Rngs(0)))
      >>> model.position_embedding.shape, model.head.kernel.shape
      ((1, 197, 768), (768, 1000))
    """
    return ViT(
        image_size=image_size,
        patch_size=16,
        width=768,
        depth=12,
        num_heads=12,
        mlp_width=3072,
        num_classes=num_classes,
        dropout_rate=dropout_rate,
        rngs=rngs,
    )
