"""Around an optimizer, inside a chain and at its end an algorithm does the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract_cases import ALGORITHMS
from flax import nnx
from jax import lax

from sparsejax import sparse_optax

STEPS = 8
SHAPES = {"bias": (8,), "conv": (3, 3, 2, 4), "fc": (8, 8)}

# Slots of earlier links are out of reach, so only an optimizer without any can agree.
POSITIONS = {
    "around": lambda build: build(optax.sgd(0.25)),
    "inside": lambda build: optax.chain(optax.scale(2.0), build(optax.sgd(0.125))),
    "last": lambda build: optax.chain(optax.sgd(0.25), build(None)),
}


def grid(seed, *leading):
    """Draw multiples of 1/16, which float32 adds exactly."""
    rng = np.random.default_rng(seed)
    integers = {n: rng.integers(-50, 51, (*leading, *s)) for n, s in SHAPES.items()}
    return {name: np.float32(x) / 16 for name, x in integers.items()}


def train(tx, *, with_grad):
    """Train; return weights and masks after every step."""

    def step(carry, grads):
        params, state = carry
        extra = dict(grad=grads) if with_grad else {}
        updates, state = tx.update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, sparse_optax.get_masks(state))

    params = grid(0)
    run = jax.jit(functools.partial(lax.scan, step))
    return jax.device_get(run((params, tx.init(params)), grid(1, STEPS))[1])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_positions_agree(algorithm):
    algorithm = ALGORITHMS[algorithm]
    around, inside, last = (
        train(
            position(algorithm.build),
            with_grad=name == "last" and algorithm.needs_gradient,
        )
        for name, position in POSITIONS.items()
    )
    jax.tree.map(np.testing.assert_array_equal, inside, around)
    jax.tree.map(np.testing.assert_array_equal, last, around)
    (weights, masks), start = around, grid(0)
    assert all((weights[name][~masks[name]] == 0).all() for name in ("conv", "fc"))
    assert (weights["bias"][-1] != start["bias"]).any()


def test_nnx_hands_the_gradient_to_the_last_link():
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    tx = optax.chain(
        optax.adam(0.1),
        sparse_optax.rigl(sparsity=0.5, update_every=1, drop_fraction=0.5),
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    first = sparse_optax.get_masks(optimizer.opt_state)["kernel"]
    rng = np.random.default_rng(0)
    for _ in range(2):
        grads = jax.tree.map(
            lambda x: np.float32(rng.normal(size=x.shape)), nnx.state(model, nnx.Param)
        )
        optimizer.update(model, grads, grad=grads)
    mask = sparse_optax.get_masks(optimizer.opt_state)["kernel"]
    np.testing.assert_array_equal(model.kernel[...] != 0, mask)
    largest = np.abs(grads["kernel"][...])[mask & ~first]
    assert (mask != first).any()
    assert largest.min() >= np.abs(grads["kernel"][...])[~mask].max()


@pytest.mark.parametrize("updates_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_last_link_leaves_exact_zeros_whatever_it_is_handed(dtype, updates_dtype):
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(8, 32)) * 10.0 ** rng.integers(-7, 4, (8, 32))
    params = {"kernel": jnp.asarray(weights, dtype)}
    tx = sparse_optax.static(sparsity=0.5)
    state = tx.init(params)
    mask = sparse_optax.get_masks(state)["kernel"]
    bad = rng.choice([np.nan, np.inf, -np.inf, 1e30, 0.0], mask.shape)
    updates = jnp.asarray(np.where(mask, 0.25, bad), updates_dtype)
    updates, _ = jax.jit(tx.update)({"kernel": updates}, state, params)
    new = optax.apply_updates(params, updates)["kernel"]
    assert updates["kernel"].dtype == new.dtype == dtype
    expected = jnp.where(mask, params["kernel"] + jnp.asarray(0.25, dtype), 0)
    np.testing.assert_array_equal(new, expected)
