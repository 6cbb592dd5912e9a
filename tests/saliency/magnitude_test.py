"""Magnitude and random masks, what can be asked for, and pruning by masks."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from sparsejax import masks, saliency, sparse_optax


def network(seed=0):
    """Weights with ties between leaves and within, in lists longer than ten."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: np.round(rng.normal(size=shape), 1).astype(np.float32)
    layers = [{"kernel": draw(3, 5), "bias": draw(5)} for _ in range(11)]
    return {"layers": layers, "embedding": draw(7, 2), "stem": {"kernel": draw(3, 3)}}


def kernels(tree):
    """Return what is sparse by default, in tree order."""
    listed = {f"layers/{i}": layer["kernel"] for i, layer in enumerate(tree["layers"])}
    return {**listed, "stem": tree["stem"]["kernel"]}


@pytest.mark.parametrize("sparsity", [0.0, 0.8, 0.97])
def test_global_magnitude_keeps_the_largest_of_all_leaves(sparsity):
    params = network()
    found = saliency.magnitude(params, sparsity=sparsity)
    sizes = {"all": (11 * 15 + 9,)}
    scores = {name: np.abs(kernel) for name, kernel in kernels(params).items()}
    kept = oracles.uniform(sizes, sparsity)["all"]
    chex.assert_trees_all_equal(kernels(found), oracles.top_k_tree(scores, kept))
    assert found["embedding"] is None and found["layers"][3]["bias"] is None


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_magnitude_by_layer_is_that_of_the_transformation(distribution):
    params = jax.tree.map(jnp.asarray, network())
    options = {"sparsity": 0.6, "scope": "layer", "distribution": distribution}
    tx = sparse_optax.magnitude(optax.sgd(0.0), **options)
    _, state = tx.update(params, tx.init(params), params)
    found = saliency.magnitude(params, **options)
    chex.assert_trees_all_equal(found, sparse_optax.get_masks(state))


def test_stacked_layers_are_ranked_apart():
    params = {"kernel": np.float32([[[1, 2], [3, 4]], [[50, 60], [70, 80]]])}
    mask = saliency.magnitude(
        params,
        sparsity=0.5,
        scope="layer",
        distribution="uniform",
        layout={"kernel": masks.Layout(batch=(0,))},
    )["kernel"]
    expected = oracles.top_k(params["kernel"], 2, axis=(1, 2))
    np.testing.assert_array_equal(mask, expected)


def test_leaves_of_several_dtypes_are_ranked_together():
    params = {
        "a": jnp.array([[1.0, 3.0]], jnp.bfloat16),
        "b": jnp.array([[2.0, 4.0]], jnp.float16),
        "c": jnp.array([[2.5]]),
    }
    found = saliency.magnitude(params, sparsity=0.4)
    assert [found[name].ravel().tolist() for name in "abc"] == [
        [False, True],
        [False, True],
        [True],
    ]


def test_where_leaves_leaves_dense():
    params = network()
    found = saliency.magnitude(params, sparsity=0.5, where={"^layers/": 0.0})
    assert all(layer["kernel"] is None for layer in found["layers"])
    assert int(found["stem"]["kernel"].sum()) == 9 - 4
    chosen = lambda path, leaf: path == "layers/10/bias"
    found = saliency.magnitude(params, sparsity=0.5, where=chosen)
    assert int(found["layers"][10]["bias"].sum()) == 5 - 2
    assert len(jax.tree.leaves(found)) == 1


def test_random_masks_by_layer_are_those_of_static():
    params = network()
    key = jax.random.key(3)
    found = saliency.random(params, sparsity=0.7, key=key, scope="layer")
    state = sparse_optax.static(sparsity=0.7, key=key).init(params)
    chex.assert_trees_all_equal(found, sparse_optax.get_masks(state))


def test_random_masks_are_as_dense_everywhere_and_differ_by_key():
    params = {"a": jnp.zeros((100, 50)), "b": jnp.zeros((40, 25))}
    draw = functools.partial(saliency.random, params, sparsity=0.9)
    first, second = draw(key=jax.random.key(0)), draw(key=jax.random.key(1))
    for found in (first, second):
        assert int(found["a"].sum() + found["b"].sum()) == 600
        # Hypergeometric with mean 100 of 600; five standard deviations.
        assert abs(int(found["b"].sum()) - 100) < 5 * np.sqrt(600 / 6 * 5 / 6 * 0.9)
    both = int((first["a"] & second["a"]).sum())
    assert abs(both - 50) < 5 * np.sqrt(50)


def test_pruned_parameters_are_zero_off_the_masks_and_whole_elsewhere():
    params = network()
    found = saliency.magnitude(params, sparsity=0.8)
    pruned = saliency.prune(params, found)
    expected = jax.tree.map(
        lambda p, m: p if m is None else np.where(m, p, 0),
        params,
        found,
    )
    chex.assert_trees_all_equal(pruned, expected)
    state = sparse_optax.static(optax.sgd(0.1), masks=found).init(params)
    chex.assert_trees_all_equal(sparse_optax.apply_masks(params, state), pruned)


def test_masks_map_over_seeds_under_jit():
    @jax.jit
    @jax.vmap
    def draw(key):
        params = {"kernel": jax.random.normal(key, (6, 5))}
        return params, saliency.magnitude(params, sparsity=0.5)

    params, found = draw(jax.random.split(jax.random.key(0), 3))
    expected = [oracles.top_k(np.abs(kernel), 15) for kernel in params["kernel"]]
    np.testing.assert_array_equal(found["kernel"], expected)


def loss(params, batch):
    return (batch @ params["kernel"]).sum()


def apply(params, x):
    return x @ params["kernel"]


METHODS = {
    "random": lambda params, **how: saliency.random(
        params, key=jax.random.key(0), **how
    ),
    "magnitude": saliency.magnitude,
    "snip": lambda params, **how: saliency.snip(loss, params, [], **how),
    "taylor": lambda params, **how: saliency.taylor(loss, params, [], **how),
    "grasp": lambda params, **how: saliency.grasp(loss, params, [], **how),
    "synflow": lambda params, **how: saliency.synflow(apply, params, (1, 2), **how),
}


@pytest.mark.parametrize("name", METHODS)
def test_requests_that_cannot_be_meant(name):
    method = METHODS[name]
    params = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=rf"{name}\(sparsity=...\).*got 1.0"):
        method(params, sparsity=1.0)
    with pytest.raises(ValueError, match=rf'{name}\(scope=...\).*got "?\'?local'):
        method(params, sparsity=0.5, scope="local")
    with pytest.raises(ValueError, match=rf"{name}\(scope=\"global\"\) ranks all"):
        method(params, sparsity=0.5, where={"kernel": 0.3})
    with pytest.raises(ValueError, match="'krnel' must match a weight"):
        method(params, sparsity=0.5, where={"krnel": 0.0})


@pytest.mark.parametrize("name", ["snip", "taylor", "grasp"])
def test_there_must_be_batches(name):
    with pytest.raises(ValueError, match=rf"{name}\(batches\): at least one"):
        METHODS[name]({"kernel": jnp.ones((2, 2))}, sparsity=0.5)


def test_random_needs_a_key():
    with pytest.raises(TypeError, match=r"random\(key=...\) must be"):
        saliency.random({"kernel": jnp.ones((2, 2))}, sparsity=0.5, key=None)


def test_scores_that_are_no_numbers():
    params = {"a": {"kernel": jnp.array([[1.0, jnp.nan, 2.0]])}}
    with pytest.raises(ValueError, match="1 of a/kernel are NaN"):
        saliency.magnitude(params, sparsity=0.5)


def test_masks_of_another_network():
    params = {"a": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="no such parameter"):
        saliency.prune(params, {"b": jnp.ones((2, 2), bool)})
    with pytest.raises(ValueError, match="shape of the parameter"):
        saliency.prune(params, {"a": jnp.ones((2, 3), bool)})
