"""What each leaf keeps: at the start, through the schedule and at its end."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax import lax

from sparsejax import schedules, sparse_optax
from sparsejax.masks import Layout

SPARSITY = 0.7
STEPS = 9
SHAPES = {"embed": (6, 5), "conv": (3, 3, 4, 8), "fc": (16, 12), "stack": (3, 10, 6)}
LAYOUT = {"stack": Layout(batch=(0,))}
LAYERS = {
    "conv": (8, 4, 3, 3),
    "fc": (12, 16),
    **{f"stack[{i}]": (6, 10) for i in range(3)},
}


def without(*names):
    return {path: shape for path, shape in LAYERS.items() if path not in names}


OWN = {"fc": 0.25, "embed": 0.5, "conv": 0}
CASES = {
    "erk": ({}, oracles.erk(LAYERS, SPARSITY)),
    "uniform": (
        dict(distribution="uniform"),
        oracles.uniform(LAYERS, SPARSITY),
    ),
    "function": (
        dict(distribution=lambda shapes, sparsity: {p: 3 + len(p) for p in shapes}),
        {path: 3 + len(path) for path in LAYERS},
    ),
    "predicate": (
        dict(where=lambda path, leaf: path != "fc"),
        oracles.erk(without("fc") | {"embed": (5, 6)}, SPARSITY),
    ),
    "own": (
        dict(where=OWN),
        oracles.erk(without("fc", "conv"), SPARSITY) | {"fc": 144, "embed": 15},
    ),
}
FACTORIES = {
    "static": sparse_optax.static,
    "rigl": functools.partial(
        sparse_optax.rigl, update_every=2, drop_fraction=schedules.linear_drop(0.9, 8)
    ),
    "magnitude": functools.partial(
        sparse_optax.magnitude, start_at=2, update_every=2, stop_at=7
    ),
}


def expected(name, kept, step):
    """Return how many weights are active after the call numbered ``step``."""
    if name != "magnitude":
        return kept
    sizes = {path: math.prod(shape) for path, shape in LAYERS.items()}
    sizes["embed"] = 30
    events = [t for t in oracles.pruning_events(2, 2, 7) if t <= step]
    if not events:
        return {path: sizes[path] for path in kept}
    done = oracles.cubic_progress(events[-1], 2, 6)
    return {p: sizes[p] - math.floor((sizes[p] - n) * done) for p, n in kept.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FACTORIES)
def test_counts_are_exact_at_every_step(name, case):
    options, kept = CASES[case]
    tx = FACTORIES[name](optax.sgd(0.1), sparsity=SPARSITY, layout=LAYOUT, **options)
    rng = np.random.default_rng(0)
    draw = lambda *lead: {
        n: np.float32(rng.normal(size=(*lead, *s))) for n, s in SHAPES.items()
    }
    params, gradients = draw(), draw(STEPS)

    @jax.jit
    def run(params, state, gradients):
        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            active = jax.tree.map(count, sparse_optax.get_masks(state))
            return (params, state), active

        return lax.scan(step, (params, state), gradients)[1]

    def count(mask):
        return jnp.sum(mask, axis=(-2, -1) if mask.ndim == 3 else None)

    state = tx.init(params)
    history = jax.device_get(run(params, state, gradients))
    for step in range(STEPS):
        active = {path: n[step] for path, n in history.items() if n is not None}
        if "stack" in active:
            stacked = active.pop("stack")
            active |= {f"stack[{i}]": n for i, n in enumerate(stacked)}
        assert active == expected(name, kept, step)


@pytest.mark.parametrize("sparsity", [0.0, 0.35, 0.999])
def test_the_global_budget_ignores_leaves(sparsity):
    tx = sparse_optax.magnitude(optax.sgd(0.0), sparsity=sparsity, scope="global")
    rng = np.random.default_rng(0)
    params = {n: np.float32(rng.normal(size=s)) for n, s in SHAPES.items()}
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    masks = sparse_optax.get_masks(state)
    assert masks.pop("embed") is None
    size = sum(mask.size for mask in masks.values())
    active = sum(int(mask.sum()) for mask in masks.values())
    assert active == oracles.uniform({"": (size,)}, sparsity)[""]


@pytest.mark.parametrize("factory", [sparse_optax.rigl, sparse_optax.srigl])
def test_lists_of_more_than_ten_layers_get_masks_of_their_own_shapes(factory):
    # As text "10" comes before "2", and "a-b" before "a/b".
    layers = [{"kernel": jnp.ones((4 + i, 5 + i))} for i in range(12)]
    params = {"blocks": layers, "a": {"b": jnp.ones((3, 9))}, "a-b": jnp.ones((9, 3))}
    params["head"] = jnp.ones((16, 4))
    tx = factory(sparsity=0.5, distribution="uniform")
    masks = sparse_optax.get_masks(tx.init(params))
    for mask, weight in zip(*map(jax.tree.leaves, (masks, params)), strict=True):
        assert mask.shape == weight.shape
        missing = weight.size // 2 - int(mask.sum())
        assert -1 <= missing < weight.shape[-1]  # srigl leaves what no neuron shares
