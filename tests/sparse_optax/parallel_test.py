"""Every algorithm finds the same masks, bit for bit, however the training is run.

Weights and gradients are multiples of powers of two that float32 adds exactly, so
that the order in which devices add does not matter. They tie often.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract_cases import ALGORITHMS, marks
from jax import P, lax
from jax.sharding import AxisType, NamedSharding

from sparsejax import sparse_optax

STEPS = 8
DEVICES = 8
SHAPES = {"conv": (3, 3, 2, 8), "fc": (16, 8), "out": (8, 5), "bias": (8,)}
FSDP = {"conv": P(None, None, None, "x"), "fc": P("x"), "out": P("x"), "bias": P()}
REPLICATED = dict.fromkeys(SHAPES, P())
INNER = optax.sgd(0.25, momentum=0.5)

each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


def draw(rng, *leading):
    integers = {n: rng.integers(-8, 9, (*leading, *s)) for n, s in SHAPES.items()}
    return {name: np.float32(x) / 2 for name, x in integers.items()}


PARAMS = draw(np.random.default_rng(0))
BATCHES = draw(np.random.default_rng(1), STEPS, DEVICES)


def build(algorithm, **options):
    return ALGORITHMS[algorithm].build(INNER, **options)


def scanned(tx, params, state, batches, mean=lambda g, _: g.mean(0)):
    """Train on batches [steps, examples, ...]; return all masks, and the end."""

    def step(carry, batch):
        params, state = carry
        grads = jax.tree.map(mean, batch, params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), sparse_optax.get_masks(state)

    (params, state), masks = lax.scan(step, (params, state), batches)
    return masks, params, state


@functools.cache
def on_one_device(algorithm):
    return jax.jit(functools.partial(scanned, build(algorithm)))


@functools.cache
def expected(algorithm):
    state = build(algorithm).init(PARAMS)
    return jax.device_get(on_one_device(algorithm)(PARAMS, state, BATCHES))


def check_equal(actual, algorithm):
    jax.tree.map(np.testing.assert_array_equal, actual, expected(algorithm))


@each_algorithm
def test_masks_change_in_the_reference(algorithm):
    masks, params, _ = expected(algorithm)
    for name in ("conv", "fc", "out"):
        changes = (masks[name][1:] != masks[name][:-1]).reshape(STEPS - 1, -1)
        events = 1 + np.flatnonzero(changes.any(axis=1))
        assert tuple(events) == ALGORITHMS[algorithm].events, name
        assert (params[name][~masks[name][-1]] == 0).all()
    assert masks["bias"] is None


@each_algorithm
def test_eager(algorithm):
    tx, params = build(algorithm), PARAMS
    state, history = tx.init(params), []
    for step in range(STEPS):
        grads = {name: x[step].mean(0) for name, x in BATCHES.items()}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        history.append(sparse_optax.get_masks(state))
    check_equal(
        (jax.tree.map(lambda *x: np.stack(x), *history), params, state), algorithm
    )


@each_algorithm
def test_vmap_over_seeds_and_sparsities(algorithm):
    keys, sparsities = jax.random.split(jax.random.key(3), 2), (0.5, 0.8)
    init = lambda key, s: build(algorithm, key=key, sparsity=s).init(PARAMS)
    seeds = [jax.vmap(functools.partial(init, s=s))(keys) for s in sparsities]
    states = jax.tree.map(lambda *x: jnp.stack(x), *seeds)
    run = functools.partial(scanned, build(algorithm))
    for _ in range(2):
        run = jax.vmap(run, in_axes=(None, 0, None))
    together = jax.jit(run)(PARAMS, states, BATCHES)
    for i, sparsity in enumerate(sparsities):
        for j, key in enumerate(keys):
            state = init(key, sparsity)
            alone = on_one_device(algorithm)(PARAMS, state, BATCHES)
            mine = jax.tree.map(lambda x, at=(i, j): x[at], together)
            jax.tree.map(np.testing.assert_array_equal, mine, alone)
    active = jax.tree.map(lambda m: m[..., -1, :, :].sum((-1, -2)), together[0]["fc"])
    assert (active[0] > active[1]).all()


@pytest.mark.parametrize(
    "algorithm", [pytest.param(name, marks=marks(name)) for name in ALGORITHMS]
)
def test_pmap(algorithm):
    tx = build(algorithm)
    mean = lambda g, _: lax.pmean(g, "devices")
    run = jax.pmap(
        functools.partial(scanned, tx, mean=mean), "devices", in_axes=(None, None, 1)
    )
    result = jax.device_get(run(PARAMS, tx.init(PARAMS), BATCHES))
    for device in range(DEVICES):
        check_equal(jax.tree.map(lambda x, at=device: x[at], result), algorithm)


@each_algorithm
def test_shard_map(algorithm):
    tx = build(algorithm)
    mean = lambda g, _: lax.pmean(g.mean(0), "x")
    run = jax.shard_map(
        functools.partial(scanned, tx, mean=mean),
        mesh=jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P(), P(None, "x")),
        out_specs=P(),
    )
    check_equal(jax.jit(run)(PARAMS, tx.init(PARAMS), BATCHES), algorithm)


MESHES = {
    "fsdp-auto": (FSDP, AxisType.Auto),
    "fsdp-explicit": (FSDP, AxisType.Explicit),
    "data_parallel-auto": (REPLICATED, AxisType.Auto),
    "data_parallel-explicit": (REPLICATED, AxisType.Explicit),
}


def mesh_marks(algorithm, name):
    """Leave to the slow tests what comes last, and what compiles longest but once."""
    if name == "data_parallel-explicit":
        return [pytest.mark.slow]
    return [] if name == "fsdp-auto" else marks(algorithm)


@pytest.mark.parametrize(
    ("algorithm", "specs", "axis"),
    [
        pytest.param(
            algorithm,
            *mesh,
            id=f"{algorithm}-{name}",
            marks=mesh_marks(algorithm, name),
        )
        for algorithm in ALGORITHMS
        for name, mesh in MESHES.items()
    ],
)
def test_mesh(algorithm, specs, axis):
    tx = build(algorithm)
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(axis,))
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}

    def mean(batch, param):
        if axis == AxisType.Explicit:
            return jax.sharding.reshard(batch.mean(0), jax.typeof(param).sharding)
        return batch.mean(0)

    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, shardings)
        batches = jax.device_put(BATCHES, NamedSharding(mesh, P(None, "x")))
        state = tx.init(params)
        check_shardings(state, shardings)
        run = jax.jit(functools.partial(scanned, tx, mean=mean))
        masks, params, state = run(params, state, batches)
    check_shardings(state, shardings)
    check_equal((masks, params, state), algorithm)


@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit])
def test_given_masks_are_sharded_as_the_leaves(axis):
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(axis,))
    shardings = {name: NamedSharding(mesh, spec) for name, spec in FSDP.items()}
    masks = {name: PARAMS[name] > 0 for name in ("conv", "fc")}
    tx = sparse_optax.static(INNER, masks=masks)
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, shardings)
        state = tx.init(params)
        check_shardings(state, shardings)
        updates, state = jax.jit(tx.update)(params, state, params)
    check_shardings(state, shardings)
    found = sparse_optax.get_masks(state)
    jax.tree.map(
        np.testing.assert_array_equal, found, masks | dict(out=None, bias=None)
    )


def test_given_masks_are_sharded_by_a_compiled_init_too():
    """Under Explicit axes; under Auto ones ``out_shardings`` must say so."""
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Explicit,))
    shardings = {name: NamedSharding(mesh, spec) for name, spec in FSDP.items()}
    tx = sparse_optax.static(INNER, masks={"fc": PARAMS["fc"] > 0})
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(jax.device_put(PARAMS, shardings))
    check_shardings(state, shardings)


def check_shardings(state, shardings):
    for name, mask in sparse_optax.get_masks(state).items():
        if mask is not None:
            assert mask.sharding.is_equivalent_to(shardings[name], mask.ndim), name
