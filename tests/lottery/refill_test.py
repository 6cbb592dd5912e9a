"""Whole neurons in the place of an unstructured mask."""

import functools

import chex
import jax
import jax.numpy as jnp
import lottery_oracles as oracles
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from sparsejax import compaction, lottery, masks, saliency

SHAPE = (2, 1, 3, 7)  # 6 inputs, 7 neurons

compiled = jax.jit(lottery.refill, static_argnames=("score", "layout"))


def random_layer(seed, density, shape=SHAPE):
    """Return a mask and weights with ties, in which neurons are alike, too."""
    rng = np.random.default_rng(seed)
    weights = np.round(rng.normal(size=shape), 0).astype(np.float32)
    weights[..., -1] = weights[..., 0]
    return rng.random(shape) < density, weights


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.05, 0.3, 0.8, 1.0]),
    st.sampled_from([0.0, 0.2, 0.5, 0.73, 1.0]),
    st.sampled_from(["magnitude", "count"]),
)
def test_refill_is_that_of_the_oracle(seed, density, extra, score):
    mask, weights = random_layer(seed, density)
    rows, values = (x.reshape(-1, SHAPE[-1]).T for x in (mask, weights))
    scores = (rows if score == "count" else np.abs(values) * rows).sum(1)
    kept = oracles.refilled(rows, scores, extra)
    found = compiled(jnp.asarray(mask), jnp.asarray(weights), extra=extra, score=score)
    expected = np.broadcast_to(kept, SHAPE)
    np.testing.assert_array_equal(found, expected)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1))
def test_more_extra_keeps_what_less_keeps(seed, a, b):
    mask, weights = map(jnp.asarray, random_layer(seed, 0.4))
    run = functools.partial(compiled, mask, weights, score="magnitude")
    plain, less, more = (run(extra=x) for x in (0.0, min(a, b), max(a, b)))
    assert not bool((plain & ~less).any() | (less & ~more).any())
    assert int(plain[0, 0, 0].sum()) == -(-int(mask.sum()) // 6)


def test_counts_are_exact_in_large_layers():
    mask = np.zeros((3, 3, 512, 512), bool)
    mask.reshape(-1)[: 4608 * 100] = True
    weights = jnp.ones(mask.shape)
    kept = lambda mask, extra: int(
        compiled(jnp.asarray(mask), weights, extra=extra)[0, 0, 0].sum()
    )
    assert kept(mask, 0.0) == 100
    mask.reshape(-1)[-1] = True
    assert kept(mask, 0.0) == 101
    assert kept(mask, 0.25) == 203  # 100 + 412 / 4, and no more than a part of one


def test_given_scores_are_ranked_and_nan_is_never_kept():
    mask, weights = random_layer(0, 0.5)
    scores = jnp.array([0.0, 3.0, jnp.nan, 5.0, -1.0, 3.0, 9.0])
    found = lottery.refill(jnp.asarray(mask), weights, score=scores)
    k = oracles.neurons_kept(int(mask.sum()), 6, 7, 0)
    kept = np.isin(np.arange(7), [6, 3, 1, 5, 0, 4][:k])
    np.testing.assert_array_equal(found, np.broadcast_to(kept, SHAPE))


def test_stacked_layers_are_refilled_apart():
    layout = masks.Layout(batch=(0,))
    mask, weights = random_layer(3, 0.4, (2, 6, 7))
    mask[1] &= (np.arange(6) < 2)[:, None]
    mask, weights = jnp.asarray(mask), jnp.asarray(weights)
    found = compiled(mask, weights, extra=0.1, layout=layout)
    for i in range(2):
        alone = compiled(mask[i], weights[i], extra=0.1)
        np.testing.assert_array_equal(found[i], alone)


def test_neurons_of_attention_are_heads_by_dimensions():
    shape = (6, 2, 5)  # [in, heads, head_dim]
    layout = masks.Layout(outputs=(1, 2), inputs=(0,))
    mask, weights = map(jnp.asarray, random_layer(4, 0.5, shape))
    found = compiled(mask, weights, layout=layout)
    flat = compiled(mask.reshape(6, 10), weights.reshape(6, 10))
    np.testing.assert_array_equal(np.reshape(found, (6, 10)), flat)


def test_scores_of_feature_maps():
    rng = np.random.default_rng(0)
    y, g = rng.normal(size=(2, 5, 4, 3, 6)).astype(np.float32)
    maps = y.transpose(3, 0, 1, 2).reshape(6, -1)
    l1 = [sum(abs(x) for x in row) for row in maps]
    l2 = [sum(x * x for x in row) ** 0.5 for row in maps]
    np.testing.assert_allclose(lottery.feature_norm(y), l1, rtol=1e-5)
    np.testing.assert_allclose(lottery.feature_norm(y, 2), l2, rtol=1e-5)
    taylor = [
        sum(abs((y[n, ..., c] * g[n, ..., c]).sum()) for n in range(5))
        for c in range(6)
    ]
    found = lottery.feature_saliency(jnp.asarray(y), jnp.asarray(g))
    np.testing.assert_allclose(found, taylor, rtol=1e-5)


def test_feature_saliency_is_the_change_of_the_loss():
    y = jax.random.normal(jax.random.key(0), (1, 3, 3, 4))
    target = jax.random.normal(jax.random.key(1), y.shape)
    loss = lambda y: jnp.sum(target * y)  # linear: the first order is all there is
    found = lottery.feature_saliency(y, jax.grad(loss)(y))
    change = [abs(loss(y) - loss(y.at[..., c].set(0))) for c in range(4)]
    np.testing.assert_allclose(found, change, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra": 1.5}, r"extra=.*\[0, 1\], got 1.5"),
        ({"score": "size"}, "score= must be one of .*'size'"),
        ({"score": jnp.ones(6)}, r"one number for each neuron, shape \(7,\)"),
        ({"weights": jnp.ones((2, 1, 3, 6))}, "mask and weights must have one shape"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    arguments = {"mask": jnp.ones(SHAPE, bool), "weights": jnp.ones(SHAPE)} | options
    with pytest.raises(ValueError, match=message):
        lottery.refill(**arguments)


class Network(nnx.Module):
    """A residual stream of 10 channels between a stem and a head that stay dense."""

    def __init__(self, rngs):
        conv = functools.partial(nnx.Conv, padding="SAME", rngs=rngs)
        self.stem = conv(3, 8, (3, 3))
        self.conv1, self.norm1 = conv(8, 12, (3, 3)), nnx.BatchNorm(12, rngs=rngs)
        self.conv2, self.norm2 = conv(12, 10, (3, 3)), nnx.BatchNorm(10, rngs=rngs)
        self.conv3, self.norm3 = conv(10, 10, (1, 1)), nnx.BatchNorm(10, rngs=rngs)
        self.head = nnx.Linear(10, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = self.norm2(self.conv2(x))
        x = nnx.relu(x + self.norm3(self.conv3(nnx.relu(x))))
        return self.head(x.mean((1, 2)))


PRUNED = ("conv1", "conv2", "conv3")
INPUT = jax.ShapeDtypeStruct((2, 6, 6, 3), jnp.float32)


@pytest.fixture(scope="module")
def network():
    """Return a network whose norms shift, its groups and unstructured masks."""
    model = nnx.jit(lambda: Network(nnx.Rngs(0)))()
    model.eval()
    rng = np.random.default_rng(0)
    for norm in (model.norm1, model.norm2, model.norm3):
        for value in (norm.scale, norm.bias, norm.mean, norm.var):
            value[...] = rng.random(value.shape, np.float32) + np.float32(0.5)
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    found = saliency.magnitude(
        params, sparsity=0.6, where=lambda path, _: path in kernels(PRUNED)
    )
    return model, params, compaction.channel_groups(model, INPUT), found


def kernels(layers):
    return [f"{layer}/kernel" for layer in layers]


def with_masks(model, params, found):
    """Return a copy of a model with weights off the masks set to 0."""
    copy = nnx.clone(model)
    nnx.update(copy, saliency.prune(params, found))
    return copy


def test_tree_without_groups_refills_each_layer(network):
    _, params, _, found = network
    refilled = lottery.refill_tree(found, params, extra=0.1, score="count")
    for layer in PRUNED:
        mask, weights = found[layer]["kernel"], params[layer]["kernel"]
        alone = compiled(mask, weights, extra=0.1, score="count")
        np.testing.assert_array_equal(refilled[layer]["kernel"], alone)
    assert jax.tree.structure(refilled) == jax.tree.structure(found)


def test_compaction_removes_what_groups_do_not_keep(network):
    model, params, groups, found = network
    extra = 0.2
    refilled = lottery.refill_tree(found, params, extra=extra, groups=groups)
    assert refilled["stem"]["kernel"] is None and refilled["stem"]["bias"] is None

    active = {layer: int(found[layer]["kernel"].sum()) for layer in PRUNED}
    k1 = oracles.neurons_kept(active["conv1"], 72, 12, extra)
    stream = oracles.neurons_kept(active["conv2"] + active["conv3"], 118, 10, extra)
    assert k1 < 12 and stream < 10

    # The stream's channels are ranked by what both of its layers score.
    rows = lambda layer: np.abs(
        np.where(found[layer]["kernel"], params[layer]["kernel"], 0)
    ).sum((0, 1, 2))
    best = np.argsort(-(rows("conv2") + rows("conv3")), kind="stable")[:stream]
    kept = np.isin(np.arange(10), best)
    for layer in ("norm2", "norm3"):
        np.testing.assert_array_equal(refilled[layer]["scale"], kept)
        np.testing.assert_array_equal(refilled[layer]["bias"], kept)
    head = np.broadcast_to(kept[:, None], (10, 4))
    np.testing.assert_array_equal(refilled["head"]["kernel"], head)
    square = np.outer(kept, kept)[None, None]
    np.testing.assert_array_equal(refilled["conv3"]["kernel"], square)

    masked = with_masks(model, params, refilled)
    small, report = compaction.compact(masked, INPUT)
    assert small.conv1.kernel.shape == (3, 3, 8, k1)
    assert small.conv2.kernel.shape == (3, 3, k1, stream)
    assert small.conv3.kernel.shape == (1, 1, stream, stream)
    assert small.norm3.bias.shape == (stream,)
    assert sum(report.removed.values()) == 12 - k1 + 10 - stream
    x = jax.random.normal(jax.random.key(0), INPUT.shape)
    outputs = [nnx.jit(lambda model, x: model(x))(m, x) for m in (small, masked)]
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-5)


def test_group_of_a_dense_layer_is_refilled_by_layer(network):
    _, params, groups, found = network
    found = {**found, "conv3": {**found["conv3"], "kernel": None}}
    together = lottery.refill_tree(found, params, groups=groups)
    alone = lottery.refill_tree(found, params)
    rows = np.asarray(together["conv2"]["kernel"]).any((0, 1, 2))
    np.testing.assert_array_equal(
        rows, np.asarray(alone["conv2"]["kernel"]).any((0, 1, 2))
    )
    assert together["norm2"]["scale"] is together["conv3"]["kernel"] is None
    assert together["norm1"]["scale"] is not None


def test_tree_takes_scores_by_path_and_is_compiled(network):
    _, params, groups, found = network
    key = jax.random.key(0)
    sizes = dict(zip(PRUNED, (12, 10, 10), strict=True))
    scores = {
        f"{layer}/kernel": jax.random.uniform(jax.random.fold_in(key, i), (n,))
        for i, (layer, n) in enumerate(sizes.items())
    }
    run = functools.partial(lottery.refill_tree, groups=groups)
    eager = run(found, params, score=scores)
    chex.assert_trees_all_equal(
        jax.jit(lambda *a: run(a[0], a[1], score=a[2]))(found, params, scores), eager
    )
    total = np.asarray(scores["conv2/kernel"] + scores["conv3/kernel"])
    kept = np.asarray(eager["norm2"]["scale"])
    assert total[kept].min() >= total[~kept].max()
    del scores["conv2/kernel"]
    with pytest.raises(ValueError, match="must have scores for conv2/kernel"):
        run(found, params, score=scores)


def test_tree_refuses_what_belongs_to_another_model(network):
    _, params, groups, found = network
    with pytest.raises(
        ValueError, match="conv1/kernel: mask and weights|mask of conv1"
    ):
        lottery.refill_tree({"conv1": {"kernel": jnp.ones((2, 2), bool)}}, params)
    other = {**params, "norm1": {"scale": jnp.ones(3), "bias": jnp.ones(3)}}
    with pytest.raises(
        ValueError, match=r"groups=.*conv1 must have 12 indices.*\(3,\)"
    ):
        lottery.refill_tree(found, other, groups=groups)
