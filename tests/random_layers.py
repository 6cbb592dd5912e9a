"""Layers to draw random networks from.

A layer is drawn for the shape of one example and is a function of (params, x). What it
computes is common; how it says so varies, as the graph is all that compaction sees.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Params = dict[str, Any]
Layer = Callable[[Params, jax.Array], jax.Array]


class Draw:
    """What is drawn so far: parameters, and the names of the layers."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.params: Params = {}
        self.names: list[str] = []

    def pick(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def size(self, low=4, high=9):
        return int(self.rng.integers(low, high))

    def normal(self, *shape, scale=1.0, shift=0.0):
        return (shift + scale * self.rng.normal(size=shape)).astype(np.float32)

    def kernel(self, *shape, fan_in):
        return self.normal(*shape, scale=(1.5 / max(fan_in, 1)) ** 0.5)

    def module(self, kind, **leaves):
        """Add a module of parameters; return its name."""
        name = f"{kind}{len(self.names)}"
        self.names.append(name)
        self.params[name] = leaves
        return name

    def shape_after(self, layer, shape):
        """Return the shape of one example after the layer."""
        x = jax.ShapeDtypeStruct((2, *shape), np.float32)
        return jax.eval_shape(layer, self.params, x).shape[1:]


def along(vector, x, axis=-1):
    """Give a vector the rank of x, along an axis of it."""
    shape = [1] * x.ndim
    shape[axis] = vector.shape[0]
    return vector.reshape(shape)


# Layers of any rank, channels last


def dense(draw, shape, features=None) -> Layer:
    c, o = shape[-1], features or draw.size()
    how = draw.pick("dot", "dot", "einsum", "transposed", "masked", "low rank")
    leaves = {"kernel": draw.kernel(c, o, fan_in=c)}
    if how == "transposed":
        leaves["kernel"] = leaves["kernel"].T
    if how == "low rank":
        leaves |= {"a": draw.kernel(c, 2, fan_in=c), "b": draw.normal(2, o)}
    if draw.pick(True, True, False):
        leaves["bias"] = draw.normal(o, scale=0.3)
    mask = draw.rng.random((c, o)) < 0.7
    name = draw.module("dense", **leaves)

    def apply(params, x):
        p = params[name]
        w = p["kernel"]
        if how == "einsum":
            y = jnp.einsum("...i,io->...o", x, w)
        elif how == "transposed":
            y = jnp.tensordot(x, w, ((-1,), (1,)))
        elif how == "masked":
            y = x @ (w * mask.astype(w.dtype))
        elif how == "low rank":
            y = x @ (w + p["a"] @ p["b"])
        else:
            y = x @ w
        return y + jnp.broadcast_to(p["bias"], y.shape) if "bias" in p else y

    return apply


def activation(draw, shape) -> Layer:
    return unary(draw.pick(jax.nn.relu, jax.nn.gelu, jnp.tanh, jax.nn.silu))


def unary(function) -> Layer:
    return lambda params, x: function(x)


def layer_norm(draw, shape) -> Layer:
    """LayerNorm with the fast variance, as Flax has it, or RMSNorm."""
    c, center = shape[-1], draw.pick(True, False)
    leaves = {"scale": draw.normal(c, scale=0.2, shift=1)}
    if center:
        leaves["bias"] = draw.normal(c, scale=0.3)
    name = draw.module("layernorm" if center else "rmsnorm", **leaves)

    def apply(params, x):
        p = params[name]
        square = jnp.mean(x * x, -1, keepdims=True)
        if not center:
            return x * lax.rsqrt(square + 1e-5) * along(p["scale"], x)
        mean = x.mean(-1, keepdims=True)
        variance = jnp.maximum(0, square - mean**2)
        normal = (x - mean) * lax.rsqrt(variance + 1e-5)
        return normal * along(p["scale"], x) + along(p["bias"], x)

    return apply


def batch_norm(draw, shape) -> Layer:
    """BatchNorm in evaluation, often with an activation after it."""
    c = shape[-1]
    name = draw.module(
        "batchnorm",
        scale=draw.normal(c, scale=0.2, shift=1),
        bias=draw.normal(c, scale=0.3),
        mean=draw.normal(c, scale=0.3),
        var=draw.normal(c, scale=0.2) ** 2 + np.float32(0.5),
    )
    then = draw.pick(jax.nn.relu, jax.nn.relu, lambda x: x)

    def apply(params, x):
        scale, bias, mean, var = (
            along(params[name][leaf], x) for leaf in ("scale", "bias", "mean", "var")
        )
        return then((x - mean) * (lax.rsqrt(var + 1e-5) * scale) + bias)

    return apply


def cut(draw, shape) -> Layer:
    """Drop, reorder, pad or repeat channels."""
    c = shape[-1]
    order = draw.rng.permutation(c)
    how = draw.pick(
        lambda x: x[..., ::2],
        lambda x: x[..., 1 : c - 1],
        lambda x: jnp.roll(x, 2, -1),
        lambda x: x[..., ::-1],
        lambda x: x[..., order],
        lambda x: jnp.repeat(x, 2, -1),
        lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 2)]),
        lambda x: x + jnp.roll(x, 1, -1),
    )
    return unary(how)


def layer_scale(draw, shape) -> Layer:
    """Scale by a parameter, and by constants that differ from channel to channel."""
    name = draw.module("layerscale", gamma=draw.normal(1, shape[-1]))
    weights = draw.normal(shape[-1], shift=1)

    def apply(params, x):
        gamma = params[name]["gamma"].reshape([1] * (x.ndim - 1) + [-1])
        return x * gamma * along(weights.astype(x.dtype), x)

    return apply


# Images, [height, width, channels]


def conv(draw, shape) -> Layer:
    c = shape[-1]
    groups = draw.pick(1, 1, 1, *[g for g in (2, 3, c) if c % g == 0])
    size = draw.pick(1, 3, 3) if min(shape[:2]) > 2 else 1
    strides = draw.pick(1, 1, 2)
    dilation = draw.pick(1, 1, 2) if min(shape[:2]) > 4 else 1
    padding = draw.pick("SAME", "SAME", "VALID")
    o = groups * draw.pick(1, 2) if groups > 1 else draw.size()
    leaves = {"kernel": draw.kernel(size, size, c // groups, o, fan_in=size * c)}
    if draw.pick(True, False):
        leaves["bias"] = draw.normal(o, scale=0.3)
    name = draw.module("conv" if groups == 1 else "groupedconv", **leaves)
    first = draw.pick(False, False, True)  # channels first

    def apply(params, x):
        p = params[name]
        layout = ("NCHW", "HWIO", "NCHW") if first else ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(
            x.transpose(0, 3, 1, 2) if first else x,
            p["kernel"],
            (strides, strides),
            padding,
            rhs_dilation=(dilation, dilation),
            dimension_numbers=layout,
            feature_group_count=groups,
        )
        if "bias" in p:
            y = y + along(p["bias"], y, 1 if first else -1)
        return y.transpose(0, 2, 3, 1) if first else y

    return apply


def conv_transpose(draw, shape) -> Layer:
    c, o = shape[-1], draw.size()
    if shape[0] > 4:
        return conv(draw, shape)
    name = draw.module("convtranspose", kernel=draw.kernel(2, 2, c, o, fan_in=4 * c))
    numbers = ("NHWC", "HWIO", "NHWC")
    return lambda params, x: lax.conv_transpose(
        x, params[name]["kernel"], (2, 2), "SAME", dimension_numbers=numbers
    )


def group_norm(draw, shape) -> Layer:
    c = shape[-1]
    groups = draw.pick(*[g for g in (1, 2, 3, 4) if c % g == 0])
    name = draw.module(
        "groupnorm",
        scale=draw.normal(c, scale=0.2, shift=1),
        bias=draw.normal(c, scale=0.3),
    )

    def apply(params, x):
        y = x.reshape(*x.shape[:-1], groups, c // groups)
        axes = (*range(1, y.ndim - 2), y.ndim - 1)
        mean = y.mean(axes, keepdims=True)
        square = jnp.mean(y * y, axes, keepdims=True)
        y = (y - mean) * lax.rsqrt(jnp.maximum(square - mean * mean, 0) + 1e-5)
        y = y.reshape(x.shape) * along(params[name]["scale"], x)
        return y + along(params[name]["bias"], x)

    return apply


def pool(draw, shape) -> Layer:
    if min(shape[:2]) < 3:
        return activation(draw, shape)
    window, strides = (1, 2, 2, 1), (1, *draw.pick((1, 1), (2, 2)), 1)
    padding = draw.pick("SAME", "VALID")
    if draw.pick(True, False):
        return lambda params, x: lax.reduce_window(
            x, -jnp.inf, lax.max, window, strides, padding
        )
    return lambda params, x: (
        lax.reduce_window(x, 0.0, lax.add, window, strides, padding) / 4
    )


def pixel_shuffle(draw, shape) -> Layer:
    """Move channels to space, or space to channels."""
    h, w, c = shape
    if h > 4:
        if h % 2 or w % 2:
            return pool(draw, shape)

        def gather(params, x):
            y = x.reshape(x.shape[0], h // 2, 2, w // 2, 2, c)
            return y.transpose(0, 1, 3, 2, 4, 5).reshape(-1, h // 2, w // 2, 4 * c)

        return gather
    o = draw.size(2, 4)
    widen = dense(draw, shape, features=4 * o)

    def scatter(params, x):
        y = widen(params, x).reshape(-1, h, w, 2, 2, o)
        return y.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 2 * h, 2 * w, o)

    return scatter


def to_tokens(draw, shape) -> Layer:
    return unary(lambda x: x.reshape(x.shape[0], -1, x.shape[-1]))


def to_vector(draw, shape) -> Layer:
    """Average, flatten, or take one position."""
    if len(shape) == 1:
        return activation(draw, shape)
    return unary(
        draw.pick(
            lambda x: x.mean(tuple(range(1, x.ndim - 1))),
            lambda x: x.reshape(x.shape[0], -1),
            lambda x: x[(slice(None), *[-1] * (x.ndim - 2))],
        )
    )


# Tokens, [tokens, channels]


def attention(draw, shape) -> Layer:
    """Attention of several heads: fused or separate, grouped, rotated, normalised."""
    t, c = shape
    heads, d = draw.pick(2, 3, 4), draw.pick(2, 4)
    how = draw.pick("fused", "separate", "one key", "rotary", "query norm", "library")
    kv = 1 if how == "one key" else heads
    leaves = {
        "q": draw.kernel(c, heads, d, fan_in=c / 4),
        "k": draw.kernel(c, kv, d, fan_in=c / 4),
        "v": draw.kernel(c, kv, d, fan_in=c),
        "out": draw.kernel(heads, d, c, fan_in=heads * d),
        "bias": draw.normal(3, heads, d, scale=0.3),
    }
    if how == "fused":
        fused = [leaves.pop(n).reshape(c, -1) for n in "qkv"]
        leaves["qkv"] = np.concatenate(fused, 1)
        leaves["out"] = leaves["out"].reshape(-1, c)
    if how == "query norm":
        leaves["norm"] = draw.normal(d, scale=0.2, shift=1)
    angle = np.arange(t)[:, None] / 10.0 ** np.arange(d // 2)
    cos, sin = (np.tile(f(angle), 2).astype(np.float32) for f in (np.cos, np.sin))
    name = draw.module("attention", **leaves)

    def rotate(x):
        turned = jnp.concatenate([-x[..., d // 2 :], x[..., : d // 2]], -1)
        cosine, sine = (f[None, :, None].astype(x.dtype) for f in (cos, sin))
        return x * cosine + turned * sine

    def apply(params, x):
        p = params[name]
        if how == "fused":
            q, k, v = jnp.moveaxis((x @ p["qkv"]).reshape(-1, t, 3, heads, d), 2, 0)
        else:
            q, k, v = (jnp.einsum("btc,chd->bthd", x, p[n]) for n in "qkv")
        if how == "one key":
            k, v = (jnp.repeat(y, heads, 2) for y in (k, v))
        q, k, v = (y + b[None, None] for y, b in zip((q, k, v), p["bias"], strict=True))
        if how == "rotary":
            q, k = rotate(q), rotate(k)
        if how == "query norm":
            q = q * lax.rsqrt(jnp.mean(q * q, -1, keepdims=True) + 1e-5)
            q = q * along(p["norm"], q)
        if how == "library":
            y = jax.nn.dot_product_attention(q, k, v)
        else:
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(d).astype(x.dtype)
            if how == "separate":
                scores = jnp.where(jnp.tri(t, dtype=bool)[None, None], scores, -1e9)
            y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, -1), v)
        if how == "fused":
            return x + y.reshape(x.shape[0], t, -1) @ p["out"]
        return x + jnp.einsum("bqhd,hdc->bqc", y, p["out"])

    return apply


def mix_tokens(draw, shape) -> Layer:
    """A dense layer over the tokens of each channel (MLP-Mixer)."""
    t, h = shape[0], draw.size()
    name = draw.module(
        "mixer", up=draw.kernel(t, h, fan_in=t), down=draw.kernel(h, t, fan_in=h)
    )

    def apply(params, x):
        y = jax.nn.gelu(x.transpose(0, 2, 1) @ params[name]["up"])
        return x + (y @ params[name]["down"]).transpose(0, 2, 1)

    return apply


def add_positions(draw, shape) -> Layer:
    """Embed the positions, and put a token of its own in front."""
    name = draw.module(
        "positions",
        table=draw.normal(*shape, scale=0.3),
        token=draw.normal(1, 1, shape[-1]),
    )

    def apply(params, x):
        x = x + params[name]["table"][None]
        token = params[name]["token"]
        return jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1)

    return apply
