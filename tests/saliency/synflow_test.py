"""SynFlow against sums over paths, its conservation, and networks that are deep."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import saliency_oracles
from flax import linen, nnx

from sparsejax import models, saliency
from sparsejax.saliency._target import target
from sparsejax.saliency.synflow import synflow_scores


def chain(*units):
    """Return matrices that lead from one number of units to the next."""
    rng = np.random.default_rng(0)
    pairs = zip(units, units[1:], strict=False)
    return {str(i): draw(rng, *shape) for i, shape in enumerate(pairs)}


def draw(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def apply_chain(params, x):
    *hidden, last = params.values()
    for kernel in hidden:
        x = jax.nn.relu(x @ kernel)
    return x @ last


def pruned_by_paths(layers, kept, rounds):
    """Prune in rounds by sums over paths; return the masks of every round."""
    size = sum(layer.size for layer in layers.values())
    masks = {name: np.ones(layer.shape, bool) for name, layer in layers.items()}
    history = []
    for turn in range(1, rounds + 1):
        pruned = [layer * masks[name] for name, layer in layers.items()]
        scores = saliency_oracles.path_scores([w.astype(np.float64) for w in pruned])
        scores = dict(zip(layers, scores, strict=True))
        now = math.ceil(size * (kept / size) ** (turn / rounds))
        masks = oracles.top_k_tree(scores, kept if turn == rounds else now, where=masks)
        history.append(masks)
    return history


@pytest.mark.parametrize("rounds", [1, 7])
def test_masks_are_those_of_sums_over_paths(rounds):
    layers = chain(3, 4, 5, 2)
    found = saliency.synflow(apply_chain, layers, (1, 3), sparsity=0.7, rounds=rounds)
    kept = oracles.uniform({"all": (42,)}, 0.7)["all"]
    history = pruned_by_paths(layers, kept, rounds)
    chex.assert_trees_all_equal(found, history[-1])


def test_masks_by_layer_keep_what_each_was_given():
    options = {"scope": "layer", "distribution": "uniform", "rounds": 20}
    layers = chain(3, 4, 5, 2)
    found = saliency.synflow(apply_chain, layers, (1, 3), sparsity=0.5, **options)
    assert [int(found[name].sum()) for name in "012"] == [6, 10, 5]


def test_rounds_empty_no_layer_of_a_chain_and_one_round_does():
    layers = chain(20, 30, 5, 40, 3, 30, 10)
    size = sum(layer.size for layer in layers.values())
    prune = functools.partial(saliency.synflow, apply_chain, layers, (1, 20))
    left = lambda masks: [int(mask.sum()) for mask in masks.values()]
    barely = left(prune(sparsity=1 - 8 / size))
    assert min(barely) == 1 and sum(barely) == 8
    assert min(left(prune(sparsity=1 - 30 / size, rounds=1))) == 0


def residual(depth=40, width=3):
    """Blocks so strong that the flow through all of them is far from float32."""
    rng = np.random.default_rng(0)
    blocks = [
        {"a": 9 * draw(rng, width, 4), "b": 9 * draw(rng, 4, width)}
        for _ in range(depth)
    ]
    return {"blocks": blocks, "head": draw(rng, width, 2)}


def apply_residual(params, x):
    for block in params["blocks"]:
        x = x + jax.nn.relu(x @ block["a"]) @ block["b"]
    return x @ params["head"]


def stacked(params):
    blocks = jax.tree.map(lambda *leaves: np.stack(leaves), *params["blocks"])
    return {"blocks": blocks, "head": params["head"]}


def apply_stacked(params, x):
    def block(x, p):
        return x + jax.nn.relu(x @ p["a"]) @ p["b"] + p["a"][0, 0], p["b"].sum()

    x, _ = jax.lax.scan(block, x, params["blocks"])
    return x @ params["head"]


@pytest.mark.parametrize("scanned", [False, True])
def test_scores_of_a_deep_residual_network_share_one_factor(scanned):
    params, apply = residual(), apply_residual
    pairs = [(p["a"].astype(float), p["b"].astype(float)) for p in params["blocks"]]
    of_blocks, of_head = saliency_oracles.residual_scores(
        pairs, params["head"].astype(float)
    )
    assert of_head.sum() > 1e60
    blocks = [{"a": a, "b": b} for a, b in of_blocks]
    expected = {"blocks": blocks, "head": of_head}
    if scanned:
        params, expected, apply = stacked(params), stacked(expected), apply_stacked
    chosen = target("test", params, 0.9, "global", "erk", None, None)
    everything = [np.ones(w.shape, bool) for w in chosen.weights(params)]
    scores, total, entering = jax.jit(
        lambda params: synflow_scores(apply, params, everything, (1, 3), chosen)
    )(params)
    np.testing.assert_allclose(float(entering), float(total), rtol=1e-5)
    join = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    factors = join(scores).astype(float) / join(expected)
    np.testing.assert_allclose(factors / factors[0], 1, rtol=2e-5)


def small_resnet():
    model = models.resnet_cifar(8, width=4, rngs=nnx.Rngs(0))
    model.eval()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return lambda params, x: nnx.merge(graphdef, params, rest)(x), params


def test_flow_is_conserved_and_no_layer_of_a_resnet_is_emptied():
    apply, params = small_resnet()
    shape = (1, 8, 8, 3)
    masks = saliency.synflow(apply, params, shape, sparsity=0.95)
    active = {
        "/".join(map(str, path)): int(mask.sum())
        for path, mask in nnx.to_flat_state(nnx.as_pure(masks))
        if mask is not None
    }
    size = sum(w.size for w in jax.tree.leaves(params) if w.ndim > 1)
    assert sum(active.values()) == oracles.uniform({"all": (size,)}, 0.95)["all"]
    assert all(active.values())

    chosen = target("test", params, 0.95, "global", "erk", None, None)
    paths = [leaf.path for leaf in chosen.leaves]
    for kept in (
        [jnp.ones_like(w, bool) for w in chosen.weights(params)],
        chosen.weights(masks),
    ):
        scores, total, entering = jax.jit(
            lambda params, kept: synflow_scores(apply, params, kept, shape, chosen)
        )(params, kept)
        sums = {p: float(s.sum()) for p, s in zip(paths, scores, strict=True)}
        flows = [sums["stem/conv/kernel"], sums["head/kernel"], float(entering)]
        np.testing.assert_allclose(flows, float(total), rtol=1e-5)
        assert all(score.min() >= 0 for score in scores)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean(axis=(1, 2)))


class Linen(linen.Module):
    train: bool = False

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(3, (3, 3), name="conv")(x)
        x = linen.BatchNorm(use_running_average=not self.train, name="norm")(x)
        return linen.Dense(2, name="head")(linen.relu(x).mean(axis=(1, 2)))


def weights_and_statistics(seed):
    """Return the same kernels for all seeds, and other vectors for each."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    params = {
        "conv": {"kernel": draw(fixed, 3, 3, 2, 3), "bias": draw(rng, 3)},
        "norm": {"scale": draw(rng, 3), "bias": draw(rng, 3)},
        "head": {"kernel": draw(fixed, 3, 2), "bias": draw(rng, 2)},
    }
    return params, {"norm": {"mean": draw(rng, 3), "var": draw(rng, 3) ** 2}}


def nnx_masks(seed):
    params, statistics = weights_and_statistics(seed)
    model = Nnx(nnx.Rngs(0))
    nnx.update(model, params)
    nnx.update(model, statistics)
    model.eval()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    apply = jax.jit(lambda params, x: nnx.merge(graphdef, params, rest)(x))
    masks = saliency.synflow(apply, params, (1, 4, 4, 2), sparsity=0.6, rounds=3)
    return nnx.to_pure_dict(masks)


def module_masks(seed):
    params, statistics = weights_and_statistics(seed)
    model = Nnx(nnx.Rngs(0))
    nnx.update(model, params)
    nnx.update(model, statistics)
    model.eval()
    call = lambda model, x: model(x)
    masks = saliency.synflow(call, model, (1, 4, 4, 2), sparsity=0.6, rounds=3)
    return nnx.to_pure_dict(nnx.state(masks, nnx.Param))


def linen_masks(seed):
    params, statistics = weights_and_statistics(seed)

    def apply(params, x):
        return Linen().apply({"params": params, "batch_stats": statistics}, x)

    return saliency.synflow(apply, params, (1, 4, 4, 2), sparsity=0.6, rounds=3)


def bare_masks(seed):
    def apply(params, x):
        kernel, numbers = params["conv"]["kernel"], ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=numbers
        )
        x = jnp.maximum(x, 0).mean(axis=(1, 2))
        return {"logits": x @ params["head"]["kernel"], "step": 3}

    params, _ = weights_and_statistics(seed)
    return saliency.synflow(apply, params, (1, 4, 4, 2), sparsity=0.6, rounds=3)


def test_frameworks_biases_and_statistics_change_nothing():
    found = [nnx_masks(1), module_masks(2), linen_masks(3), bare_masks(4)]
    for masks in found:
        assert masks["conv"]["bias"] is None and masks["norm"]["scale"] is None
        kernels = [masks["conv"]["kernel"], masks["head"]["kernel"]]
        expected = [found[0]["conv"]["kernel"], found[0]["head"]["kernel"]]
        chex.assert_trees_all_equal(kernels, expected)
    assert int(kernels[0].sum() + kernels[1].sum()) == 60 - 36


def test_bounds_and_scales_change_no_flow():
    zero, scale = jnp.zeros(()), jnp.array([3.0, -7.0])

    def bounded(params, x):
        x = jnp.clip(x @ params["0"], zero, 6) @ params["1"]
        return params["gate"] * x * scale[None]

    layers = {name: 10 * kernel for name, kernel in chain(3, 4, 2).items()}
    params = {**layers, "gate": jnp.zeros(())}
    masks = saliency.synflow(bounded, params, (1, 3), sparsity=0.5, rounds=2)
    expected = pruned_by_paths(layers, 10, 2)[-1]
    chex.assert_trees_all_equal(masks, {**expected, "gate": None})


def refuse(apply, params, match, shape=(1, 3)):
    with pytest.raises(ValueError, match=match):
        saliency.synflow(apply, params, shape, sparsity=0.5, rounds=2)


def test_networks_through_which_no_flow_is_conserved():
    kernel = {"kernel": np.ones((3, 4), np.float32)}
    lost = "what enters the network must leave it"
    refuse(lambda p, x: jnp.tanh(x @ p["kernel"]), kernel, lost)
    refuse(lambda p, x: (x @ p["kernel"]) ** 2, kernel, lost)
    params, statistics = weights_and_statistics(0)

    def apply_train(params, x):
        variables = {"params": params, "batch_stats": statistics}
        return Linen(train=True).apply(variables, x, mutable=["batch_stats"])[0]

    refuse(apply_train, params, lost, (1, 4, 4, 2))


def test_networks_that_nothing_flows_through():
    kernel = {"kernel": np.zeros((3, 4), np.float32)}
    refuse(lambda p, x: x @ p["kernel"], kernel, "must be positive and finite, got 0")
    refuse(lambda p, x: p["kernel"], kernel, "must be positive and finite, got 0")
    kernel = {"kernel": np.full((3, 4), np.inf, np.float32)}
    refuse(lambda p, x: x @ p["kernel"], kernel, "finite, got nan")


@pytest.mark.parametrize("rounds", [0, 2.0])
def test_rounds_are_a_number_of_rounds(rounds):
    with pytest.raises(ValueError, match=r"synflow\(rounds=...\)"):
        saliency.synflow(apply_chain, chain(3, 2), (1, 3), sparsity=0.5, rounds=rounds)


@pytest.mark.slow
def test_scores_of_resnet_104_are_those_of_float64():
    depth, shape = (17, 17, 17), (1, 8, 8, 3)
    model = models.ResNet(
        depth, (16, 32, 64), 100, block=models.Bottleneck, rngs=nnx.Rngs(0)
    )
    model.eval()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    apply = lambda params, x: nnx.merge(graphdef, params, rest)(x)
    chosen = target("test", params, 0.9, "global", "erk", None, None)
    assert len(chosen.leaves) == 158

    def total(kernels, x):
        """Sum the outputs; at first, norms and biases do nothing."""
        return apply(chosen.replace(params, kernels), x).sum()

    kernels = [np.abs(w) for w in chosen.weights(params)]
    assert not np.isfinite(jax.jit(total)(kernels, np.ones(shape, np.float32)))
    with jax.enable_x64(True):
        wide = [kernel.astype(np.float64) for kernel in kernels]
        gradients = jax.jit(jax.grad(total))(wide, np.ones(shape))
        expected = [w * np.asarray(g) for w, g in zip(wide, gradients, strict=True)]
    assert expected[-1].sum() > 1e80

    everything = [np.ones(w.shape, bool) for w in kernels]
    scores, _, _ = jax.jit(
        lambda params: synflow_scores(apply, params, everything, shape, chosen)
    )(params)
    join = lambda arrays: np.concatenate([np.ravel(x) for x in arrays])
    found, expected = join(scores).astype(float), join(expected)
    factors = found / expected * (expected.sum() / found.sum())
    np.testing.assert_allclose(factors, 1, rtol=1e-4)
    kept = len(found) // 10
    same = oracles.top_k(found, kept) == oracles.top_k(expected, kept)
    assert same.mean() > 1 - 1e-5
