"""Whole dead layers, branches and heads go, with their compute."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax import compaction, models

IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)


def operations(fn, *inputs):
    """Count the convolutions and matrix multiplications of a compiled function."""
    text = jax.jit(fn).lower(*inputs).compile().as_text()
    # Kernels of the CPU's libraries are custom calls.
    pattern = (
        r"= \S+ (?:convolution|dot)\(|custom_call_target=\"__onednn\$(?:matmul|conv)"
    )
    return len(re.findall(pattern, text))


@functools.cache
def network():
    model = models.resnet_cifar(8, width=4, rngs=nnx.Rngs(0))
    model.eval()
    return model, compaction.channel_groups(model, IMAGES)


def compacted(masked, backend, inputs=IMAGES, **options):
    small, report = compaction.compact(masked, inputs, backend=backend, **options)
    np.testing.assert_allclose(small(inputs), masked(inputs), atol=1e-5)
    return small, report


@pytest.mark.parametrize("backend", ["rebuild", "replay"])
def test_a_dead_branch_is_not_computed(backend):
    model, report = network()
    name = "blocks/0/conv1/conv"
    masked = report.zero(model, {name: range(report[name].size)})
    small, after = compacted(masked, backend)
    assert after.removed == {name: 4}
    assert operations(model, IMAGES) - operations(small, IMAGES) == 2


def test_a_branch_whose_last_layer_is_zero_is_dead():
    model = nnx.clone(network()[0])
    last = model.blocks[0].conv2
    for leaf in (last.conv.kernel, last.norm.bias, last.norm.mean):
        leaf[...] = jnp.zeros_like(leaf[...])
    small, report = compacted(model, "rebuild")
    assert report.removed == {"blocks/0/conv1/conv": 4}
    assert small.blocks[0].conv1.conv.kernel.shape == (3, 3, 4, 0)


def test_what_is_left_of_a_dead_branch_trains():
    model, report = network()
    masked = report.zero(model, {"blocks/0/conv1/conv": range(4)})
    small, _ = compaction.compact(masked, IMAGES)
    loss = lambda model: jnp.mean(model(IMAGES) ** 2)
    grads = nnx.grad(loss)(small)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert np.abs(grads.head.kernel[...]).max() > 0


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(4, 8, 16, decode=False, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(x + self.attention(x))


@pytest.mark.parametrize("dead", [[1], [0, 1, 2, 3]], ids=["one_head", "all_heads"])
@pytest.mark.parametrize("backend", ["rebuild", "replay"])
def test_dead_heads_go(backend, dead):
    model = Attention(nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    report = compaction.channel_groups(model, x)
    masked = report.zero(model, {"attention/query": dead})
    small, after = compacted(masked, backend, x)
    assert after.removed["attention/query"] == len(dead)
    if backend == "rebuild":
        assert small.attention.num_heads == 4 - len(dead)
    if len(dead) == 4:
        assert operations(small, x) == 1


class Inverted(nnx.Module):
    def __init__(self, rngs):
        self.expand = nnx.Conv(3, 8, (1, 1), rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.project = nnx.Conv(8, 3, (1, 1), rngs=rngs)

    def __call__(self, x):
        return x + self.project(nnx.relu(self.depthwise(self.expand(x))))


@pytest.mark.parametrize(("backend", "left"), [("rebuild", 1), ("replay", 0)])
def test_of_a_depthwise_convolution_in_a_module_one_group_stays(backend, left):
    model = Inverted(nnx.Rngs(0))
    report = compaction.channel_groups(model, IMAGES)
    _, after = compacted(report.zero(model, {"expand": range(8)}), backend)
    assert after.removed == {"expand": 8 - left}


@pytest.mark.parametrize(("dead", "kept"), [(1, 16), (8, 8), (9, 8), (13, 8), (16, 0)])
def test_sizes_are_rounded_by_keeping_dead_channels(dead, kept):
    model, report = network()
    name = "blocks/2/conv1/conv"
    assert report[name].size == 16
    masked = report.zero(model, {name: range(dead)})
    small, after = compacted(masked, "rebuild", round_to=8)
    assert small.blocks[2].conv1.conv.kernel.shape[-1] == kept
    assert ("round" in after.kept.get(name, "")) == (16 - dead != kept)


def test_of_heads_and_their_size_the_size_is_rounded():
    model = Attention(nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    report = compaction.channel_groups(model, x)
    masked = report.zero(
        model,
        {"attention/query": [0], "attention/query[2]": [0], "attention/value": [1]},
    )
    small, _ = compacted(masked, "rebuild", x, round_to=4)
    assert small.attention.query.kernel.shape == (8, 3, 4)


def test_queries_and_values_keep_equally_many_dimensions():
    model = Attention(nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    report = compaction.channel_groups(model, x)
    channels = {"attention/query[2]": [0, 1, 2], "attention/value": [3]}
    small, after = compacted(report.zero(model, channels), "rebuild", x)
    assert small.attention.head_dim == 3
    assert after.removed == {"attention/query[2]": 1, "attention/value": 1}
    small, after = compacted(report.zero(model, channels), "replay", x)
    assert after.removed == {"attention/query[2]": 3, "attention/value": 1}
