"""A run that is saved, killed and restored goes on as if nothing had happened."""

import functools

import jax
import numpy as np
import optax
import pytest
from contract_cases import ALGORITHMS
from jax import P
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from sparsejax import sparse_optax

STEPS = 8
SAVED_AT = 5  # between the two events
SHAPES = {"bias": (8,), "conv": (3, 3, 2, 8), "fc": (16, 8)}
SPECS = {"bias": P(), "conv": P(None, None, None, "x"), "fc": P("x")}


def grid(seed, *leading):
    """Draw multiples of 1/16, which float32 adds exactly."""
    rng = np.random.default_rng(seed)
    integers = {n: rng.integers(-50, 51, (*leading, *s)) for n, s in SHAPES.items()}
    return {name: np.float32(x) / 16 for name, x in integers.items()}


PARAMS, GRADIENTS = grid(0), grid(1, STEPS)
ONE = SingleDeviceSharding(jax.devices()[0])

assert_equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)


def stepper(tx):
    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(step, carry, start, stop, shardings=ONE):
    for i in range(start, stop):
        grads = {name: x[i] for name, x in GRADIENTS.items()}
        carry = step(*carry, jax.device_put(grads, shardings))
    return carry


def save_and_load(folder, carry, tx, sharding_of):
    """Save; load what another process, which has only the config, asks for."""
    saved = dict(params=carry[0], state=carry[1])
    ocp.save_checkpointables(folder / "run", saved)
    params = jax.eval_shape(lambda: PARAMS)
    asked = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x)),
        dict(params=params, state=jax.eval_shape(tx.init, params)),
    )
    loaded = ocp.load_checkpointables(folder / "run", asked)
    assert isinstance(loaded["state"], sparse_optax.SparseState)
    return loaded["params"], loaded["state"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_restored_run_goes_on_bit_for_bit(algorithm, tmp_path):
    algorithm = ALGORITHMS[algorithm]
    tx = algorithm.build(optax.adamw(0.02))
    step = stepper(tx)
    params = jax.device_put(PARAMS, ONE)
    at_save = train(step, (params, tx.init(params)), 0, SAVED_AT)
    # Whatever the factory is told about the key, what was saved counts.
    other = algorithm.build(optax.adamw(0.02), key=jax.random.key(9))
    restored = save_and_load(tmp_path, at_save, other, lambda _: ONE)
    assert_equal(restored, at_save)
    finished = train(step, at_save, SAVED_AT, STEPS)
    assert_equal(train(stepper(other), restored, SAVED_AT, STEPS), finished)
    masks = [sparse_optax.get_masks(state)["fc"] for _, state in (at_save, finished)]
    assert (masks[0] != masks[1]).any() == bool(algorithm.events)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_goes_on_with_the_same_masks_on_fewer_devices(algorithm, tmp_path):
    tx = ALGORITHMS[algorithm].build(optax.sgd(0.25, momentum=0.5))
    step = stepper(tx)
    start = jax.device_put(PARAMS, ONE)
    finished = train(step, (start, tx.init(start)), 0, STEPS)

    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    start = jax.device_put(PARAMS, shardings)
    at_save = train(step, (start, tx.init(start)), 0, SAVED_AT, shardings)
    on_one = save_and_load(tmp_path / "one", at_save, tx, lambda _: ONE)
    assert_equal(train(step, on_one, SAVED_AT, STEPS), finished)

    by_shape = {SHAPES[name]: sharding for name, sharding in shardings.items()}
    everywhere = NamedSharding(mesh, P())
    sharding_of = lambda x: by_shape.get(x.shape, everywhere)
    on_eight = save_and_load(tmp_path / "eight", on_one, tx, sharding_of)
    assert_equal(on_eight, at_save)
    for name, mask in sparse_optax.get_masks(on_eight[1]).items():
        assert mask is None or mask.sharding == shardings[name]
