"""The learned rescaling against differences of a loss in NumPy, without derivatives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saliency_oracles
from flax import nnx

from sparsejax import recipes, saliency
from sparsejax.recipes.rescaled_init import _direction

SHAPES = {"a/bias": (4,), "a/kernel": (3, 4), "b/kernel": (4, 2)}
SPLITS = np.cumsum([int(np.prod(shape)) for shape in SHAPES.values()])


def network(dtype=np.float32):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(2 * rng.normal(size=shape), dtype)
    return {
        "a": {"bias": draw(4) / 4, "kernel": draw(3, 4)},
        "b": {"kernel": draw(4, 2)},
    }


def masks():
    return saliency.magnitude(network(), sparsity=0.5)


def batches():
    rng = np.random.default_rng(1)
    draw = lambda: {
        "x": rng.normal(size=(5, 3)).astype(np.float32),
        "y": rng.integers(2, size=5),
    }
    return [draw() for _ in range(5)]


def loss(params, batch):
    a, b = params["a"], params["b"]
    x = batch["x"].astype(a["kernel"].dtype)
    hidden = jnp.tanh(x @ a["kernel"] + a["bias"][None])
    logits = jax.nn.log_softmax(hidden @ b["kernel"])
    return -jnp.take_along_axis(logits, batch["y"][:, None], axis=1).mean()


def loss_of(flat, *batches):
    """Return the same loss in NumPy, of all parameters as one vector."""
    parts = np.split(flat, SPLITS[:-1])
    bias, a, b = (p.reshape(s) for p, s in zip(parts, SHAPES.values(), strict=True))
    x, y = (np.concatenate([batch[name] for batch in batches]) for name in "xy")
    logits = np.tanh(x @ a + bias) @ b
    logits = logits - logits.max(axis=1, keepdims=True)
    log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -log_softmax[np.arange(len(y)), y].mean()


def flattened(tree) -> np.ndarray:
    leaves = [tree["a"]["bias"], tree["a"]["kernel"], tree["b"]["kernel"]]
    return np.concatenate([np.ravel(leaf) for leaf in leaves]).astype(np.float64)


def all_active():
    """Return the masks as one vector, with biases active."""
    return flattened({**masks(), "a": {**masks()["a"], "bias": np.ones(4)}})


def spread(scales) -> np.ndarray:
    return np.repeat(scales, np.diff(SPLITS, prepend=0))


def descend(iterations, *, max_norm, simulated="sgd", official=False, stream=None):
    """Return the scales after some iterations, and what each descended on."""
    active = all_active()
    weights = flattened(network()) * active
    kept = np.ones_like(active) if official else active
    stream = itertools.cycle(batches()) if stream is None else stream
    scales, second, done = np.ones(3), np.zeros(3), []
    first, counts = {"norm": np.zeros(3), "loss": np.zeros(3)}, {"norm": 0, "loss": 0}
    for _ in range(iterations):
        pair = [next(stream), next(stream)]

        def gradient(scales, pair=pair):
            at = spread(scales) * weights
            return kept * saliency_oracles.gradient(lambda w: loss_of(w, *pair), at)

        def norm_of(g):
            return np.abs(g).sum() if simulated == "adam" else np.sqrt((g**2).sum())

        g = gradient(scales)
        step = 0.1 * (np.sign(g) if simulated == "adam" else g / norm_of(g))
        if norm_of(g) > max_norm:
            what = "norm"
            objective = lambda scales, f=gradient: norm_of(f(scales))
        else:
            what = "loss"
            both = [pair[0], next(stream)]
            objective = lambda scales, both=both, step=step: (
                loss_of(spread(scales) * weights - step, *both) / 0.1
            )
        d = np.clip(saliency_oracles.gradient(objective, scales, 1e-3), -1, 1)
        counts[what] += 1
        first[what] = 0.9 * first[what] + 0.1 * d
        second = 0.999 * second + 0.001 * d**2
        mean = first[what] / (1 - 0.9 ** counts[what])
        deviation = np.sqrt(second / (1 - 0.999 ** sum(counts.values())))
        scales = scales - 0.05 * mean / (deviation + 1e-8)
        scales = np.maximum(scales, [0, 0.01, 0.01])
        done.append(what)
    return scales, done


def rescaled(iterations, params=None, **options):
    params = network() if params is None else params
    stream = itertools.cycle(batches())
    options = {"masks": masks(), "learning_rate": 0.05, **options}
    return recipes.rescaled_init(loss, params, stream, iterations=iterations, **options)


def scales_of(found, params):
    """Return the one factor of every tensor; fail where it is not one."""
    factors = []
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        there = np.asarray(a) != 0
        factor = np.asarray(a, float)[there] / np.asarray(b, float)[there]
        np.testing.assert_allclose(factor, factor[0], rtol=2 * jnp.finfo(b.dtype).eps)
        factors.append(factor[0])
    return np.array(factors)


@pytest.mark.parametrize(
    ("simulated", "official", "max_norm"),
    [("sgd", False, 0.42), ("sgd", True, 0.55), ("adam", False, 1.0)],
)
def test_scales_are_those_of_the_oracle(simulated, official, max_norm):
    options = dict(simulated=simulated, official=official, max_norm=max_norm)
    expected, done = descend(8, **options)
    assert {"norm", "loss"} == set(done)
    found = rescaled(8, **options)
    np.testing.assert_allclose(scales_of(found, network()), expected, rtol=2e-3)
    np.testing.assert_array_equal(flattened(found) != 0, all_active())


def test_pruned_weights_count_only_as_the_authors_have_it():
    """The norm of the unmasked gradient is larger, so that another branch is taken."""
    pruned = saliency.prune(network(), masks())
    pair = batches()[:2]
    partial = jax.tree_util.Partial(loss)
    of = lambda active: _direction(partial, jnp.ones(3), pruned, active, pair, "sgd")
    (ours, direction), (theirs, _) = of({"a/kernel": masks()["a"]["kernel"]}), of({})
    assert ours < theirs
    off = ~np.asarray(masks()["a"]["kernel"])
    assert not np.asarray(direction["a"]["kernel"])[off].any()

    between = float(ours + theirs) / 2
    for official, what in ((False, "loss"), (True, "norm")):
        _, done = descend(1, max_norm=between, official=official)
        assert done == [what]
    masked, unmasked = (
        scales_of(rescaled(6, max_norm=between, official=x), network())
        for x in (False, True)
    )
    assert np.abs(masked - unmasked).max() > 0.01


def test_bfloat16_stays_bfloat16_and_zero():
    params = network(jnp.bfloat16)
    found = rescaled(4, params, max_norm=0.42)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(flattened(found) != 0, all_active())
    expected = scales_of(rescaled(4, max_norm=0.42), network())
    np.testing.assert_allclose(scales_of(found, params), expected, atol=0.03)


def test_factors_have_a_lower_bound_and_zeros_have_none():
    params = network()
    params["a"]["bias"] = jnp.zeros(4)
    found = rescaled(30, params, max_norm=1e-3, learning_rate=0.2, min_scale=0.5)
    assert not np.asarray(found["a"]["bias"]).any()
    kernels = [found["a"]["kernel"], found["b"]["kernel"]]
    factors = scales_of(kernels, [params["a"]["kernel"], params["b"]["kernel"]])
    assert factors.min() == pytest.approx(0.5)


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 3, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean(axis=(1, 2)))


def test_a_network_with_batch_statistics_keeps_its_running_ones():
    model = Normed(nnx.Rngs(0))
    model.eval()
    model.set_attributes(nnx.BatchNorm, use_running_average=False)
    graphdef, params, others = nnx.split(model, nnx.Param, ...)
    before = jax.tree.map(np.array, nnx.as_pure(others))

    def loss(params, batch):
        logits = nnx.merge(graphdef, params, others, copy=True)(batch["x"])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"], axis=1)
        return -chosen.mean()

    x = np.random.default_rng(0).normal(size=(4, 4, 4, 1)).astype(np.float32)
    batch = {"x": x, "y": np.arange(4)[:, None] % 2}
    found = recipes.rescaled_init(
        loss, params, itertools.repeat(batch), iterations=2, max_norm=100.0
    )
    jax.tree.map(np.testing.assert_array_equal, before, nnx.as_pure(others))
    scales_of(found["conv"], params["conv"])
    # Behind a norm by the batch, the factor of a convolution changes no output.
    only_conv = nnx.to_pure_dict(params) | {"conv": nnx.to_pure_dict(found)["conv"]}
    expected = float(loss(params, batch))
    assert float(loss(only_conv, batch)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations=.... must be an integer of at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate=...\\) must be above 0, got 0.0"),
        ({"max_norm": -1.0}, "max_norm=...\\) must be above 0, got -1.0"),
        ({"step_size": float("nan")}, "step_size=...\\) must be above 0, got nan"),
        ({"min_scale": 2.0}, "must lie in \\[0, 1\\], got 2.0"),
        ({"simulated": "lion"}, 'must be "sgd" or "adam", got \'lion\''),
        ({"masks": {"c": np.ones(3, bool)}}, "there is a mask for c"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rescaled(**{"iterations": 2, **options})


def test_what_cannot_be_computed_is_refused():
    with pytest.raises(ValueError, match="ran out: an iteration takes up to three"):
        recipes.rescaled_init(loss, network(), batches(), iterations=3)
    broken = {**network(), "b": {"kernel": jnp.full((4, 2), jnp.nan)}}
    with pytest.raises(ValueError, match="positive and finite, got nan"):
        rescaled(1, broken)
    counted = {**network(), "count": jnp.zeros((), int)}
    with pytest.raises(TypeError, match="count must be floating-point, got int32"):
        rescaled(1, counted)
