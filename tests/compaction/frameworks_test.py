"""One mechanism for every way to write a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_modules
import random_networks
from compaction_checks import (
    assert_exact,
    depends_on_input,
    groups_of,
    random_channels,
    relative_error,
    run,
    shapes,
    without,
)
from flax import linen as nn
from flax import nnx

from sparsejax import compaction

BACKENDS = ["rebuild", "replay"]


def half(report, fraction=0.5):
    """Choose the first half of the channels of each group that is not pinned."""
    return {
        group.name: list(range(int(fraction * group.size)))
        for group in report.groups
        if not group.pinned and int(fraction * group.size)
    }


def arrays(module):
    """Return the parameters and statistics of a module."""
    return nnx.state(module, (nnx.Param, nnx.BatchStat))


def call(module, *inputs):
    return module(*inputs)


def check_module(module, *inputs, choose=half, backend="rebuild"):
    """Mask groups of a module, compact it and compare; return the smaller one."""
    batch = [x[:2] for x in inputs]
    report = compaction.channel_groups(module, *batch)
    chosen = choose(report)
    masked = report.zero(module, chosen)
    expected = run(call, masked, *inputs)
    if not depends_on_input(expected):
        return None
    before = [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(masked))]
    small, after = compaction.compact(masked, *batch, backend=backend)
    for one, other in zip(before, jax.tree.leaves(nnx.state(masked)), strict=True):
        np.testing.assert_array_equal(one, other)  # the model itself is not touched
    for n in (len(inputs[0]), 3):
        actual = run(call, small, *(x[:n] for x in inputs))
        assert relative_error(actual, expected[:n]) < 1e-5
    assert chosen
    stay = {g for g, c in chosen.items() if after.removed.get(g, 0) < len(c)}
    if backend == "replay":
        assert not stay
        return small
    # A module of Flax has one size for the dimensions of its keys and values.
    assert all("query" in name or "value" in name for name in stay)
    assert stay <= after.kept.keys()
    assert type(small) is type(masked)
    full, left = shapes(arrays(masked)), shapes(arrays(small))
    assert left.keys() >= full.keys()
    gone = {name: c for name, c in chosen.items() if name not in stay}
    for path, shape in without(report, gone, full).items():
        assert np.all(np.less_equal(left[path], shape)), path
    return small


class Block(nnx.Module):
    def __init__(self, width, *, rngs):
        self.conv1 = nnx.Conv(width, 10, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(10, use_running_average=True, rngs=rngs)
        self.depthwise = nnx.Conv(10, 10, (3, 3), feature_group_count=10, rngs=rngs)
        self.conv2 = nnx.Conv(10, width, (1, 1), rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.norm(self.conv1(x)))
        return x + self.conv2(nnx.relu(self.depthwise(y)))


class ConvNet(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.blocks = nnx.List([Block(8, rngs=rngs) for _ in range(2)])
        self.norm = nnx.GroupNorm(8, num_groups=2, rngs=rngs)
        self.head = nnx.Linear(8 * 9, 5, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = nnx.avg_pool(nnx.gelu(self.norm(x)), (2, 2), (2, 2))
        return self.head(x.reshape(x.shape[0], -1))


class Transformer(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 8, 16, decode=False, rngs=rngs)
        self.up = nnx.LinearGeneral(8, (2, 6), rngs=rngs)
        self.down = nnx.LinearGeneral((2, 6), 8, axis=(-2, -1), rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        x = x + self.attention(self.norm(x))
        x = x + self.down(nnx.gelu(self.up(x)))
        return self.head(x.mean(1))


class Tied(nnx.Module):
    """A language model whose head is its embedding."""

    def __init__(self, *, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Linear(12, 8, rngs=rngs)
        self.norm = nnx.RMSNorm(8, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.down(nnx.silu(self.up(x)))
        return self.embed.attend(self.norm(x))


class Residual(nnx.Module):
    def __init__(self, *, rngs):
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.up = nnx.Linear(6, 10, rngs=rngs)
        self.down = nnx.Linear(10, 6, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Scanned(nnx.Module):
    """Stacked blocks, initialised under vmap and run under scan and remat."""

    def __init__(self, *, rngs):
        stack = nnx.vmap(lambda r: Residual(rngs=r), in_axes=0, out_axes=0)
        self.blocks = stack(rngs.split(3))
        self.head = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def body(block, carry):
            return block(carry)

        return self.head(body(self.blocks, x))


MODULES = {
    "convolutions": (ConvNet, (4, 6, 6, 3)),
    "attention": (Transformer, (4, 5, 6)),
    "tied embedding": (Tied, None),
    "scan": (Scanned, (4, 6)),
}


def build(name):
    make, shape = MODULES[name]
    rng = np.random.default_rng(7)
    module = make(rngs=nnx.Rngs(0))
    random_modules.randomise(module, rng)
    if shape is None:
        return module, rng.integers(0, 11, (4, 5)).astype(np.int32)
    return module, rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODULES)
def test_modules_of_nnx(name, backend):
    module, x = build(name)
    assert check_module(module, x, backend=backend) is not None


def test_a_rebuilt_module_is_trained_as_any_other():
    module, x = build("convolutions")
    small = check_module(module, x)
    graph, params, rest = nnx.split(small, nnx.Param, ...)

    @jax.jit
    def gradients(params):
        loss = lambda p: jnp.sum(nnx.merge(graph, p, rest)(x) ** 2)
        return jax.grad(loss)(params)

    for path, gradient in shapes_and_values(gradients(params)):
        assert np.isfinite(gradient).all()
        assert np.any(gradient), path


def shapes_and_values(tree):
    return [
        (jax.tree_util.keystr(path), np.asarray(leaf))
        for path, leaf in jax.tree.leaves_with_path(tree)
    ]


def check_random_module(seed, backend):
    model = random_modules.model(seed)
    rng = np.random.default_rng([seed, 2])
    choose = lambda report: random_channels(rng, report, (0.3, 0.5))
    return check_module(model.module, model.x, choose=choose, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_compositions_of_standard_layers(backend):
    checked = [check_random_module(seed, backend) for seed in range(6)]
    assert checked.count(None) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", range(10))
def test_many_random_compositions_of_standard_layers(block, backend):
    seeds = range(100 + 10 * block, 110 + 10 * block)
    checked = [check_random_module(seed, backend) for seed in seeds]
    assert checked.count(None) <= 3


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.Dense(12)(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.relu(y)), None


class LinenNet(nn.Module):
    """Convolutions, then a stack of blocks under nn.scan, then attention."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.Conv(8, (3, 3), feature_group_count=4)(x)
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1, 8)
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(LinenBlock, length=3, **axes)()(x, None)
        x = x + nn.MultiHeadDotProductAttention(2, qkv_features=8)(x)
        return nn.Dense(3)(x.mean(1))


def linen_net():
    model = LinenNet()
    x = np.random.default_rng(0).normal(size=(4, 6, 6, 3)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    return model.apply, variables, x


def bare_net():
    net = random_networks.network(12)
    return net.fn, net.params, net.x


def equinox_convolutions():
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.GroupNorm
        last: eqx.nn.Conv2d
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.conv = eqx.nn.Conv2d(3, 8, 3, padding=1, key=keys[0])
            self.norm = eqx.nn.GroupNorm(8, 8)
            self.last = eqx.nn.Conv2d(8, 6, 3, key=keys[1])
            self.head = eqx.nn.Linear(6 * 16, 3, key=keys[2])

        def __call__(self, x):
            x = jax.nn.relu(self.norm(self.conv(x)))
            return self.head(jnp.tanh(self.last(x)).reshape(-1))

    return equinox_function(eqx, Net(jax.random.key(0)), (4, 3, 6, 6))


def equinox_perceptron():
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.MLP(5, 3, 10, 2, key=jax.random.key(1))
    return equinox_function(eqx, net, (4, 5))


def equinox_function(eqx, net, shape):
    params, static = eqx.partition(net, eqx.is_array)
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    return lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, x


@functools.cache
def compacted(make):
    """Mask half of each group of a function and compact it."""
    fn, params, x = make()
    report = groups_of(fn, params, x[:2])
    chosen = half(report)
    params = report.zero(params, chosen)
    small_fn, small, after = compaction.compact_fn(fn, params, x[:2])
    assert chosen and all(after.removed[g] >= len(c) for g, c in chosen.items())
    full, left = shapes(params), shapes(small)
    for path, shape in without(report, chosen, full).items():
        assert np.all(np.less_equal(left[path], shape)), path
    return small_fn, small, run(fn, params, x), x


FUNCTIONS = [linen_net, bare_net, equinox_convolutions, equinox_perceptron]


@pytest.mark.parametrize("make", FUNCTIONS)
def test_functions_of_parameters(make):
    fn, small, expected, x = compacted(make)
    assert depends_on_input(expected)
    assert_exact(fn, small, expected, x)


@pytest.mark.parametrize("make", FUNCTIONS)
def test_small_functions_are_exported_with_a_symbolic_batch(make):
    fn, small, expected, x = compacted(make)
    (batch,) = jax.export.symbolic_shape("batch")
    data = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    exported = jax.export.export(jax.jit(fn))(small, data)
    for n in (1, 3):
        actual = np.asarray(exported.call(small, x[:n]))
        assert relative_error(actual, expected[:n]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_modules_are_exported_with_a_symbolic_batch(backend):
    module, x = build("attention")
    small = check_module(module, x, backend=backend)
    leaves, tree = jax.tree.flatten(small)
    fn = lambda leaves, x: jax.tree.unflatten(tree, leaves)(x)
    (batch,) = jax.export.symbolic_shape("batch")
    data = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    exported = jax.export.export(jax.jit(fn))(leaves, data)
    expected = run(call, small, x)
    for n in (1, 3):
        actual = np.asarray(exported.call(leaves, x[:n]))
        assert relative_error(actual, expected[:n]) < 1e-5
