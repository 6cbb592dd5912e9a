"""The networks whose compaction is measured, without weights, and weights for them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from sparsejax import compaction, models
from sparsejax.masks.layout import named_leaves

VOCABULARY = 1000


class Network(NamedTuple):
    """A module, or a function of parameters, and what one example looks like.

    Attributes:
      params: a module or a tree, of `jax.ShapeDtypeStruct`.
      fn: ``fn(params, examples)``; None: the module is called.
      example: shape of one.
      dtype: of an example; integers are tokens.
    """

    params: Any
    fn: Callable[..., Any] | None
    example: tuple[int, ...]
    dtype: Any = np.float32

    def call(self, params: Any, x: Any) -> Any:
        return params(x) if self.fn is None else self.fn(params, x)

    def groups(self, params: Any, x: Any) -> compaction.Report:
        if self.fn is None:
            return compaction.channel_groups(params, x)
        return compaction.channel_groups(self.fn, x, params=params)

    def compact(self, params: Any, x: Any, **options: Any) -> tuple:
        """Return a call, its parameters and the report."""
        if self.fn is None:
            return self.call, *compaction.compact(params, x, **options)
        return compaction.compact_fn(self.fn, params, x, **options)

    def inputs(self, batch: int, rng: np.random.Generator) -> np.ndarray:
        shape = (batch, *self.example)
        if self.dtype == np.int32:
            return rng.integers(0, VOCABULARY, shape).astype(np.int32)
        return rng.standard_normal(shape, np.float32)


class Case(NamedTuple):
    """A line of the table: a network, the part of its channels that go, an option."""

    build: Callable[[], Network]
    fraction: float = 0.5
    round_to: int = 1


def with_random_weights(params: Any, rng: np.random.Generator) -> Any:
    """Fill a tree: no bias, scale or statistic is as an initializer leaves it.

    Kernels have a variance of 2 over their fan-in, so that signals keep their size
    behind a ReLU; and twice that, as half of the inputs are to be masked, but where
    there is one input, as in depthwise convolutions.
    """

    def draw(path: str, leaf: Any) -> np.ndarray:
        name = path.rpartition("/")[2]
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        if leaf.ndim == 1:
            return 0.3 * rng.standard_normal(leaf.shape, np.float32)
        outputs = leaf.shape[0 if name == "weight" else -1]  # Equinox: [out, in, ...]
        gain = 2 if leaf.shape[-2] == 1 else 4
        scale = np.sqrt(gain * outputs / leaf.size)
        return rng.standard_normal(leaf.shape, np.float32) * np.float32(scale)

    drawn = [draw(path, leaf) for path, leaf in named_leaves(params).items()]
    return jax.tree.structure(params).unflatten(drawn)


def zoo(make: Callable[..., nnx.Module], size: int, **options: Any) -> Case:
    """Return the case of a network of `sparsejax.models` on square images."""

    def build() -> Network:
        model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
        model.eval()
        return Network(model, None, (size, size, 3))

    return Case(build, **options)


def lenet() -> Network:
    model = nnx.eval_shape(lambda: models.lenet_300_100(rngs=nnx.Rngs(0)))
    return Network(model, None, (28, 28, 1))


class LanguageModel(nnx.Module):
    """Layers of Flax: tokens, convolutions, attention, a gate; its head is tied."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.conv = nnx.Conv(width, 2 * width, (3,), padding="CAUSAL", rngs=rngs)
        self.group_norm = nnx.GroupNorm(2 * width, num_groups=8, rngs=rngs)
        self.pointwise = nnx.Conv(2 * width, width, (1,), rngs=rngs)
        self.norm1 = nnx.RMSNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(8, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.LinearGeneral(width, (2, 3 * width), rngs=rngs)
        self.down = nnx.Linear(3 * width, width, rngs=rngs)
        self.norm3 = nnx.RMSNorm(width, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        x = x + self.pointwise(nnx.silu(self.group_norm(self.conv(x))))
        x = x + self.attention(self.norm1(x))
        gated = self.up(self.norm2(x))
        x = x + self.down(gated[..., 0, :] * nnx.gelu(gated[..., 1, :]))
        return self.embed.attend(self.norm3(x))


def flax_layers() -> Network:
    model = nnx.eval_shape(lambda: LanguageModel(256, rngs=nnx.Rngs(0)))
    return Network(model, None, (128,), np.int32)


class ScannedBlock(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        y = linen.relu(linen.BatchNorm(use_running_average=True)(x))
        y = linen.Conv(2 * x.shape[-1], (3, 3), use_bias=False)(y)
        return x + linen.Conv(x.shape[-1], (1, 1))(linen.relu(y)), None


class ScannedCNN(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(64, (3, 3), strides=2)(x)
        stack = linen.scan(
            ScannedBlock,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=4,
        )
        x, _ = stack()(x, None)
        return linen.Dense(10)(x.mean(axis=(1, 2)))


def linen_scan() -> Network:
    model, image = ScannedCNN(), (32, 32, 3)
    images = jax.ShapeDtypeStruct((1, *image), np.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    return Network(params, model.apply, image)


def equinox_cnn() -> Network:
    import equinox as eqx

    class CNN(eqx.Module):
        stem: eqx.nn.Conv2d
        norm: eqx.nn.GroupNorm
        middle: eqx.nn.Conv2d
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.stem = eqx.nn.Conv2d(3, 64, 3, padding=1, key=keys[0])
            self.norm = eqx.nn.GroupNorm(64, 64)
            self.middle = eqx.nn.Conv2d(64, 128, 3, stride=2, key=keys[1])
            self.head = eqx.nn.Linear(128, 10, key=keys[2])

        def __call__(self, x):
            x = jax.nn.relu(self.norm(self.stem(x)))
            return self.head(jax.nn.relu(self.middle(x)).mean(axis=(1, 2)))

    make = functools.partial(CNN, jax.random.key(0))
    params, static = eqx.partition(eqx.filter_eval_shape(make), _is_shape)
    call = lambda params, x: jax.vmap(eqx.combine(params, static))(x)
    return Network(params, call, (3, 32, 32))


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def transformer_block() -> Network:
    """A pre-norm block with a gated perceptron, in einsums on a dict of arrays."""
    width, heads, size, hidden = 512, 8, 64, 1536
    shapes = {
        "qkv": (width, 3, heads, size),
        "out": (heads, size, width),
        "gate": (width, 2, hidden),
        "down": (hidden, width),
        "norm1": (width,),
        "norm2": (width,),
        "head": (width, 10),
    }

    def norm(x, scale):
        return scale * x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    def fn(params, x):
        y = norm(x, params["norm1"])
        q, k, v = jnp.moveaxis(jnp.einsum("btd,dnhs->btnhs", y, params["qkv"]), 2, 0)
        scores = jnp.einsum("bqhs,bkhs->bhqk", q, k) / np.sqrt(size)
        mixed = jnp.einsum("bhqk,bkhs->bqhs", jax.nn.softmax(scores), v)
        x = x + jnp.einsum("bths,hsd->btd", mixed, params["out"])
        y = jnp.einsum("btd,dgf->gbtf", norm(x, params["norm2"]), params["gate"])
        x = x + jnp.einsum("btf,fd->btd", y[0] * jax.nn.silu(y[1]), params["down"])
        return jnp.einsum("btd,dc->bc", x, params["head"]) / x.shape[1]

    params = {k: jax.ShapeDtypeStruct(s, np.float32) for k, s in shapes.items()}
    return Network(params, fn, (128, width))


_resnet50 = functools.partial(models.resnet, 50)

CASES = {
    "LeNet-300-100, 28": Case(lenet),
    "VGG-16, 32": zoo(functools.partial(models.vgg_cifar, 16), 32),
    "VGG-19, 32": zoo(functools.partial(models.vgg_cifar, 19), 32),
    "ResNet-20, 32": zoo(functools.partial(models.resnet_cifar, 20), 32),
    "ResNet-32, 32": zoo(functools.partial(models.resnet_cifar, 32), 32),
    "ResNet-32 x2, 32": zoo(functools.partial(models.resnet_cifar, 32, width=32), 32),
    "WRN-22-2, 32": zoo(functools.partial(models.wide_resnet, 22, 2), 32),
    "ResNet-18, 32": zoo(functools.partial(models.resnet, 18, 10, stem="cifar"), 32),
    "ResNet-18, 224": zoo(functools.partial(models.resnet, 18), 224),
    "ResNet-34, 224": zoo(functools.partial(models.resnet, 34), 224),
    "ResNet-50, 224": zoo(_resnet50, 224),
    "ResNet-50, 224, 45 % masked": zoo(_resnet50, 224, fraction=0.45),
    "ResNet-50, 224, 45 % masked, round_to=16": zoo(
        _resnet50, 224, fraction=0.45, round_to=16
    ),
    "VGG-16, 224": zoo(functools.partial(models.vgg, 16), 224),
    "MobileNet v1, 224": zoo(models.mobilenet_v1, 224),
    "MobileNet v2, 224": zoo(models.mobilenet_v2, 224),
    "ViT-S/16, 224": zoo(models.vit_s16, 224),
    "ViT-B/16, 224": zoo(models.vit_b16, 224),
    "NNX layers": Case(flax_layers),
    "Linen nn.scan": Case(linen_scan),
    "Equinox CNN": Case(equinox_cnn),
    "bare function": Case(transformer_block),
}
