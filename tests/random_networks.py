"""Random small networks as pure functions, whose channels one may try to remove."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import random_layers as basic
from jax import lax
from random_layers import Draw, Layer, Params

EXAMPLES = 5


class Network(NamedTuple):
    """A network, its parameters and a batch for it; ``text`` names its layers."""

    fn: Layer
    params: Params
    x: np.ndarray  # [EXAMPLES, ...]
    text: str


def network(seed) -> Network:
    """Draw a network: images, tokens or vectors, layers, and a head of 3 outputs."""
    draw = Draw(seed)
    size = draw.pick(6, 8)
    shape = draw.pick((size, size, 3), (size, size, 3), (5, 6), (8,))
    x = draw.normal(EXAMPLES, *shape)
    layers = [basic.conv if len(shape) == 3 else basic.dense]
    layers += [draw.pick(*LAYERS[len(shape)]) for _ in range(draw.size(2, 5))]
    if len(shape) == 3 and draw.pick(True, False, False):
        layers += [basic.to_tokens, draw.pick(*LAYERS[2])]
    layers += [basic.to_vector, draw.pick(*LAYERS[1]), _dense_to(3)]
    return Network(chain(draw, shape, layers), draw.params, x, " ".join(draw.names))


def chain(draw, shape, layers) -> Layer:
    """Draw one layer after the other."""
    drawn = []
    for layer in layers:
        drawn.append(layer(draw, shape))
        shape = draw.shape_after(drawn[-1], shape)
    return lambda params, x: functools.reduce(lambda y, f: f(params, y), drawn, x)


def _dense_to(features):
    return functools.partial(basic.dense, features=features)


def gate(draw, shape) -> Layer:
    """A GLU: twice the channels, in halves or interleaved."""
    half, squash = draw.size(3, 6), draw.pick(jax.nn.sigmoid, jax.nn.silu, jnp.tanh)
    double, how = basic.dense(draw, shape, features=2 * half), draw.pick(0, 1, 2)

    def apply(params, x):
        y = double(params, x)
        if how == 0:
            a, b = jnp.split(y, 2, -1)
        elif how == 1:
            a, b = y[..., :half], y[..., half:]
        else:
            a, b = y[..., ::2], y[..., 1::2]
        return a * squash(b)

    return apply


def squeeze_excite(draw, shape) -> Layer:
    """Scale the channels by what the mean of the example says."""
    layers = [basic.dense, basic.activation, _dense_to(shape[-1])]
    gates = chain(draw, shape[-1:], layers)

    def apply(params, x):
        mean = x.mean(tuple(range(1, x.ndim - 1)))
        gated = jax.nn.sigmoid(gates(params, mean))
        return x * gated.reshape(x.shape[0], *[1] * (x.ndim - 2), -1)

    return apply


def residual(draw, shape) -> Layer:
    """Add a branch to its input, which is projected or padded where they differ."""
    first = draw.pick(*PLAIN[len(shape)])
    last = draw.pick(basic.activation, basic.layer_norm, basic.dense)
    branch = chain(draw, shape, [first, basic.activation, last])
    if draw.pick(True, False):
        branch = _then(branch, draw, shape, _dense_to(shape[-1]))
    *space, c = draw.shape_after(branch, shape)
    stride = -(-shape[0] // space[0]) if len(space) == 2 else 1
    if [-(-n // stride) for n in shape[:-1]] != space:
        return branch
    shortcut = lambda params, x: x
    if c > shape[-1]:
        shortcut = basic.unary(lambda x: _pad(x, (c - shape[-1]) // 2, c))
    elif c < shape[-1]:
        shortcut = basic.dense(draw, shape, features=c)
    if stride == 1:
        return lambda params, x: shortcut(params, x) + branch(params, x)
    return lambda params, x: (
        shortcut(params, x[:, ::stride, ::stride]) + branch(params, x)
    )


def _then(first, draw, shape, layer) -> Layer:
    second = layer(draw, draw.shape_after(first, shape))
    return lambda params, x: second(params, first(params, x))


def _pad(x, before, features):
    after = features - before - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, after)])


def concatenate(draw, shape) -> Layer:
    """Put new channels behind (DenseNet), before or among the old ones."""
    new, order = basic.dense(draw, shape), draw.pick(0, 1, 2)

    def apply(params, x):
        y = jnp.tanh(new(params, x))
        if order == 2:
            return jnp.concatenate([y[..., :2], x, y[..., 2:]], -1)
        return jnp.concatenate([x, y] if order == 0 else [y, x], -1)

    return apply


def tied(draw, shape) -> Layer:
    """Use one weight forth and, transposed, back."""
    c, o = shape[-1], draw.size()
    name = draw.module("tied", kernel=draw.kernel(c, o, fan_in=c))
    return lambda params, x: (
        jnp.tanh(x @ params[name]["kernel"]) @ params[name]["kernel"].T
    )


def wrapped(draw, shape) -> Layer:
    """Hide layers in a transformation."""
    inner = chain(draw, shape, [draw.pick(*PLAIN[len(shape)]), basic.activation])
    how = draw.pick("remat", "jit", "vmap", "custom_jvp", "cond")
    if how == "remat":
        return jax.checkpoint(inner)
    if how == "jit":
        return jax.jit(inner)
    if how == "vmap":
        return lambda params, x: jax.vmap(lambda one: inner(params, one[None])[0])(x)
    if how == "cond":
        return lambda params, x: lax.cond(
            x.sum() > -1e4, inner, lambda p, y: inner(p, 2 * y), params, x
        )
    custom = jax.custom_jvp(inner)
    custom.defjvp(lambda primals, tangents: jax.jvp(inner, primals, tangents))
    return custom


def scanned(draw, shape) -> Layer:
    """Scan over stacked residual blocks."""
    c, h, depth = shape[-1], draw.size(), draw.pick(2, 3)
    name = draw.module(
        "scan",
        up={
            "kernel": draw.kernel(depth, c, h, fan_in=c),
            "bias": draw.normal(depth, h, scale=0.3),
        },
        down={"kernel": draw.kernel(depth, h, c, fan_in=h)},
        scale=draw.normal(depth, c, scale=0.2, shift=1),
    )

    def block(x, p):
        y = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
        y = (y * basic.along(p["scale"], y)) @ p["up"]["kernel"]
        y = jax.nn.relu(y + basic.along(p["up"]["bias"], y))
        return x + y @ p["down"]["kernel"], None

    body = draw.pick(block, jax.checkpoint(block))
    return lambda params, x: lax.scan(body, x, params[name])[0]


PLAIN = {  # hold parameters, and keep vectors, tokens [tokens, channels] or images
    1: (basic.dense, basic.dense, gate, tied),
    2: (basic.dense, gate, basic.attention, basic.attention, basic.mix_tokens),
    3: (basic.conv, basic.conv, basic.batch_norm, basic.group_norm, gate),
}
COMMON = (
    basic.activation,
    basic.layer_norm,
    basic.cut,
    basic.layer_scale,
    residual,
    residual,
    concatenate,
    wrapped,
)
LAYERS = {
    1: (*PLAIN[1], *COMMON, scanned),
    2: (*PLAIN[2], *COMMON, squeeze_excite, scanned, basic.add_positions),
    3: (
        *PLAIN[3],
        *COMMON,
        squeeze_excite,
        basic.pool,
        basic.pixel_shuffle,
        basic.conv_transpose,
    ),
}
