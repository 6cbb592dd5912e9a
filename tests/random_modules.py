"""Random small NNX models of standard layers, whose channels one may try to remove."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

EXAMPLES = 4


class Model(NamedTuple):
    """A module and a batch for it."""

    module: nnx.Module
    x: np.ndarray


class Chain(nnx.Module):
    def __init__(self, layers):
        self.layers = nnx.List(layers)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Function(nnx.Module):
    def __init__(self, function):
        self.function = function

    def __call__(self, x):
        return self.function(x)


class Residual(nnx.Module):
    def __init__(self, body):
        self.body = body

    def __call__(self, x):
        return x + self.body(x)


class Beside(nnx.Module):
    def __init__(self, body):
        self.body = body

    def __call__(self, x):
        return jnp.concatenate([x, self.body(x)], -1)


class Gate(nnx.Module):
    def __init__(self, double):
        self.double = double

    def __call__(self, x):
        value, gate = jnp.split(self.double(x), 2, -1)
        return value * nnx.sigmoid(gate)


def model(seed) -> Model:
    """Draw a model of images, tokens or vectors with an output of 3 numbers."""
    rng, rngs = np.random.default_rng(seed), nnx.Rngs(seed)
    pick = lambda *choices: choices[rng.integers(len(choices))]
    shape = pick((6, 6, 3), (6, 6, 3), (5, 6), (8,))
    c, layers = pick(6, 8, 12), []
    first = nnx.Conv if len(shape) == 3 else nnx.Linear
    sizes = ((3, 3),) if len(shape) == 3 else ()
    layers.append(first(shape[-1], c, *sizes, rngs=rngs))
    for _ in range(rng.integers(2, 5)):
        layer, c = pick(*DRAWN[len(shape)])(pick, c, rngs)
        layers += [layer, Function(pick(nnx.relu, nnx.gelu, jnp.tanh))]
    if len(shape) > 1 and pick(True, False):
        layers.append(Function(lambda x: x.reshape(x.shape[0], -1)))
        c *= 36 if len(shape) == 3 else 5
    elif len(shape) > 1:
        layers.append(Function(lambda x: x.mean(tuple(range(1, x.ndim - 1)))))
    layers.append(nnx.Linear(c, 3, rngs=rngs))
    module = Chain(layers)
    randomise(module, rng)
    x = rng.normal(size=(EXAMPLES, *shape)).astype(np.float32)
    return Model(module, x)


def randomise(module, rng):
    """Move every parameter and statistic, so that no bias or mean is zero."""
    state = nnx.state(module, (nnx.Param, nnx.BatchStat))
    moved = jax.tree.map(
        lambda v: (
            v + np.abs(rng.normal(size=v.shape, scale=0.3)).astype(v.dtype)
            if v.ndim == 1
            else v
        ),
        state,
    )
    nnx.update(module, moved)


def linear(pick, c, rngs):
    o = pick(4, 6, 9)
    return nnx.Linear(c, o, use_bias=pick(True, False), rngs=rngs), o


def mlp(pick, c, rngs):
    hidden = pick(5, 8)
    up, down = nnx.Linear(c, hidden, rngs=rngs), nnx.Linear(hidden, c, rngs=rngs)
    return Residual(Chain([up, Function(nnx.gelu), down])), c


def gate(pick, c, rngs):
    return Gate(nnx.Linear(c, 10, rngs=rngs)), 5


def beside(pick, c, rngs):
    return Beside(nnx.Linear(c, 4, rngs=rngs)), c + 4


def norm(pick, c, rngs):
    batch_norm = lambda c, rngs: nnx.BatchNorm(c, use_running_average=True, rngs=rngs)
    kind = pick(nnx.LayerNorm, nnx.RMSNorm, batch_norm)
    return kind(c, rngs=rngs), c


def group_norm(pick, c, rngs):
    groups = pick(*[g for g in (1, 2, 3, 4) if c % g == 0])
    return nnx.GroupNorm(c, num_groups=groups, rngs=rngs), c


def attention(pick, c, rngs):
    heads = pick(2, 3)
    return (
        Residual(
            nnx.MultiHeadAttention(
                heads, c, heads * pick(2, 4), decode=False, rngs=rngs
            )
        ),
        c,
    )


def conv(pick, c, rngs):
    groups = pick(1, 1, 1, 2, c) if c % 2 == 0 else pick(1, c)
    o = groups * pick(1, 2) if groups > 1 else pick(4, 6, 9)
    size = pick(1, 3)
    layer = nnx.Conv(
        c,
        o,
        (size, size),
        padding="SAME",
        feature_group_count=groups,
        use_bias=pick(True, False),
        rngs=rngs,
    )
    return layer, o


def residual_conv(pick, c, rngs):
    body = [
        nnx.Conv(c, 7, (3, 3), use_bias=False, rngs=rngs),
        nnx.BatchNorm(7, use_running_average=True, rngs=rngs),
        Function(nnx.relu),
        nnx.Conv(7, c, (3, 3), rngs=rngs),
    ]
    return Residual(Chain(body)), c


DRAWN = {
    1: (linear, mlp, gate, beside, norm),
    2: (linear, mlp, gate, norm, attention, attention),
    3: (conv, conv, residual_conv, beside, norm, group_norm),
}
