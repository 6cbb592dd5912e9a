"""Whole runs against slow loops in NumPy, on random data with many ties."""

import functools
import math
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import simulators
from jax import lax

from sparsejax import schedules, sparse_optax

STEPS = 10
SHAPES = {"bias": (4,), "conv": (3, 2, 4), "fc": (5, 7)}
LAYERS = {"conv": (4, 2, 3), "fc": (7, 5)}
SPARSITY = 0.55

SGD = optax.sgd(0.25, momentum=0.5), simulators.Sgd(0.25, 0.5)
NESTEROV = optax.sgd(0.25, 0.5, nesterov=True), simulators.Sgd(0.25, 0.5, True)
ADAMW = optax.adamw(0.02, weight_decay=0.1), simulators.AdamW(0.02, weight_decay=0.1)


class Data(NamedTuple):
    """Data of a run: weights, and gradients [steps, ...]."""

    seed: int
    weights: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]

    def gradient(self, step, weights):
        return {path: g[step] for path, g in self.gradients.items()}


@st.composite
def grids(draw):
    """Draw multiples of 1/16, on which float32 is exact: from very few, or many."""
    seed, most = draw(st.integers(0, 2**31 - 1)), draw(st.sampled_from([2, 9, 127]))
    rng = np.random.default_rng(seed)
    grid = lambda *shape: np.float32(rng.integers(-most, most + 1, shape)) / 16
    return _data(seed, grid)


@st.composite
def normals(draw):
    """Draw numbers that do not tie."""
    seed = draw(st.integers(0, 2**31 - 1))
    rng = np.random.default_rng(seed)
    return _data(seed, lambda *shape: rng.normal(size=shape).astype(np.float32))


def _data(seed, draw):
    weights = {path: draw(*shape) for path, shape in SHAPES.items()}
    gradients = {path: draw(STEPS, *shape) for path, shape in SHAPES.items()}
    return Data(seed, weights, gradients)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(factory, inner, seed, weights, gradients):
    """Train; return the first masks, and after every step weights, masks and slots."""
    tx = factory(inner, sparsity=SPARSITY, key=jax.random.key(seed))
    state = tx.init(weights)

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        masks = sparse_optax.get_masks(state)
        return (params, state), (params, masks, state.inner_state)

    history = lax.scan(step, (weights, state), gradients)[1]
    return sparse_optax.get_masks(state), history


def train(case, data):
    """Return the first masks, and after every step weights, masks and slots."""
    inner, _ = case.optimizer
    result = run(case.factory, inner, data.seed, data.weights, data.gradients)
    first, history = jax.device_get(result)
    at = lambda step: jax.tree.map(lambda x: x[step], history)
    return first, [at(step) for step in range(STEPS)]


def simulate(simulator, case, data, first, **options):
    _, optimizer = case.optimizer
    arguments = data.weights, first, data.gradient, optimizer, STEPS
    return simulator(*arguments, **case.simulated, **options)


def check(history, simulation, case, *, rtol=0.0, atol=0.0):
    """Compare masks bit for bit, weights and slots to a tolerance: none by default."""
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    for (weights, masks, slots), now in zip(history, simulation, strict=True):
        jax.tree.map(np.testing.assert_array_equal, masks, now.masks)
        jax.tree.map(close, weights, now.weights)
        for name in case.optimizer[1].slot_names:
            jax.tree.map(close, optax.tree.get(slots, name), now.slots[name])


class Case(NamedTuple):
    """What a test runs: an optimizer, and options for library and simulator."""

    optimizer: tuple[Any, Any]
    factory: Any  # one object a case: what is compiled is kept by its identity
    simulated: dict[str, Any]


def dynamic(factory, optimizer, drop_fraction, simulated_drop, **options):
    return Case(
        optimizer,
        functools.partial(factory, drop_fraction=drop_fraction, **options),
        dict(drop_fraction=simulated_drop, **options),
    )


CONSTANT = 0.4, functools.partial(oracles.constant_drop, 0.4)
COSINE = 0.55, functools.partial(oracles.cosine_drop, 0.55, 9)
LINEAR = (
    schedules.linear_drop(0.7, 16),
    functools.partial(oracles.linear_drop, 0.7, 16),
)
_rigl, _set = sparse_optax.rigl, sparse_optax.set
SKIP = dict(start_at=4, update_every=3, step_on_update=False)
RIGL = {
    "constant": dynamic(_rigl, SGD, *CONSTANT, update_every=2),
    "cosine": dynamic(_rigl, NESTEROV, *COSINE, start_at=3, update_every=2, stop_at=9),
    "linear": dynamic(_rigl, NESTEROV, *LINEAR, **SKIP, accumulate=2),
}
SET = {
    "constant": dynamic(_set, SGD, *CONSTANT, update_every=2),
    "cosine": dynamic(_set, NESTEROV, *COSINE, start_at=3, update_every=2, stop_at=9),
    "linear": dynamic(_set, NESTEROV, *LINEAR, **SKIP),
}
ADAPTIVE = dynamic(_rigl, ADAMW, *CONSTANT, update_every=2)


def each(cases):
    return pytest.mark.parametrize("case", cases.values(), ids=cases)


@each(RIGL)
@hypothesis.given(data=grids())
def test_rigl(case, data):
    first, history = train(case, data)
    active = {path: int(first[path].sum()) for path in LAYERS}
    assert active == oracles.erk(LAYERS, SPARSITY)
    check(history, simulate(simulators.rigl, case, data, first), case)


@hypothesis.given(data=normals())
def test_rigl_with_an_adaptive_optimizer(data):
    first, history = train(ADAPTIVE, data)
    simulation = simulate(simulators.rigl, ADAPTIVE, data, first)
    check(history, simulation, ADAPTIVE, rtol=1e-4, atol=1e-5)


@each(SET)
@hypothesis.given(data=grids())
def test_set(case, data):
    """Let the simulator grow what was grown; which that is, the next test looks at."""
    first, history = train(case, data)

    def grown(step, weights):
        return {path: history[step][1][path] for path in LAYERS} | {"bias": None}

    simulation = simulate(simulators.rigl, case, data, first, grow_scores=grown)
    check(history, simulation, case)


def test_set_grows_every_free_position_alike():
    mask = jnp.arange(24).reshape(4, 6) < 12
    weights = {"kernel": jnp.where(mask, jnp.arange(1.0, 25.0).reshape(4, 6), 0)}

    @jax.jit
    @jax.vmap
    def grow(key):
        tx = sparse_optax.set(sparsity=0.5, key=key, drop_fraction=0.5, update_every=1)
        state = tx.init(weights)._replace(count=1, masks={"kernel": mask})
        return tx.update(weights, state, weights)[1].masks["kernel"]

    draws = 4000
    often = grow(jax.random.split(jax.random.key(0), draws)).mean(0).ravel()
    # The 6 largest stay; 6 of the 18 others are drawn, the 6 just dropped among them.
    free = np.r_[often[:6], often[12:]]
    assert (often[6:12] == 1).all()
    deviation = np.sqrt(1 / 3 * 2 / 3 / draws)
    assert np.abs(free - 1 / 3).max() < 4 * deviation
    assert np.std(free) > deviation / 3


def pruning(optimizer, scope, **options):
    factory = functools.partial(sparse_optax.magnitude, scope=scope, **options)
    kept = oracles.erk(LAYERS, SPARSITY) | {"bias": None}
    size = sum(math.prod(shape) for shape in LAYERS.values())
    if scope == "global":
        kept = oracles.uniform({"": (size,)}, SPARSITY)[""]
    return Case(optimizer, factory, dict(options, budgets=kept))


MAGNITUDE = {
    "layer": pruning(NESTEROV, "layer", start_at=2, update_every=3, stop_at=10),
    "global": pruning(SGD, "global", start_at=0, update_every=2, stop_at=8),
    "layer_once": pruning(SGD, "layer", start_at=3),
    "global_once": pruning(NESTEROV, "global", start_at=4, stop_at=4, update_every=3),
}


@each(MAGNITUDE)
@hypothesis.given(data=grids())
def test_magnitude(case, data):
    _, history = train(case, data)
    simulation = simulators.magnitude(
        data.weights,
        gradient=data.gradient,
        optimizer=case.optimizer[1],
        steps=STEPS,
        dense=frozenset({"bias"}),
        **case.simulated,
    )
    check(history, simulation, case)
