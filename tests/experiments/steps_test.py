"""What a step computes: losses, parts of a batch, averages, and in which dtype."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from flax import nnx
from jax.extend.core import jaxprs_in_params

from configs import base
from experiments import build, data
from experiments.state import prepare
from experiments.steps import cross_entropy, follow, hits, make_train_step, split_batch
from sparsejax.masks.layout import named_leaves

DIGITS = data.load(base.Data())
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def softmax_losses(logits, shares):
    logits = logits.astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -(shares * logs).sum(axis=1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True])
def test_losses_and_hits(smoothing, mixed):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(7, 5)).astype(np.float32)
    shares = np.eye(5, dtype=np.float32)[rng.integers(5, size=7)]
    if mixed:
        shares = 0.7 * shares + 0.3 * np.roll(shares, 1, axis=1)
    labels = shares if mixed else shares.argmax(axis=1)
    smoothed = (1 - smoothing) * shares + smoothing / 5
    np.testing.assert_allclose(
        cross_entropy(logits, labels, smoothing), softmax_losses(logits, smoothed), 1e-5
    )
    expected = logits.argmax(axis=1) == shares.argmax(axis=1)
    np.testing.assert_array_equal(hits(logits, labels), expected)


def test_parts_of_a_batch_keep_examples_on_their_devices():
    """Each of four devices has three examples in a row, and gives one to each part."""
    parts = split_batch({"image": jnp.arange(12)}, 3)["image"]
    np.testing.assert_array_equal(parts, [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]])


def steps(microbatches):
    """Return all arrays after three steps, the last two of which change masks."""
    sparse = base.Sparse(method="srigl", sparsity=0.8, update_every=1, stop_fraction=1)
    config = small_runs.mlp(sparse=sparse, microbatches=microbatches)
    training = prepare(config, DIGITS, DEVICE)
    step, state = make_train_step(training, DIGITS), training.init()
    batches, values = DIGITS.train_batches(64, seed=0), []
    for _ in range(3):
        state, metrics = step(state, next(batches))
        values.append(jax.tree.map(float, metrics))
    return named_leaves(jax.device_get(state)), values


def test_parts_of_a_batch_make_the_step_of_the_batch():
    """And masks grow by the gradient of all of it."""
    (whole, expected), (parts, found) = steps(1), steps(4)
    for path, array in whole.items():
        if array.dtype == np.float32:
            np.testing.assert_allclose(parts[path], array, 1e-4, 1e-6, err_msg=path)
        else:
            np.testing.assert_array_equal(parts[path], array, err_msg=path)
    for mine, other in zip(found, expected, strict=True):
        assert mine == pytest.approx(other, rel=1e-5)


def test_the_average_follows_the_model():
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    average = nnx.clone(model)
    expected, rng = {"scale": np.ones(3), "mean": np.zeros(3)}, np.random.default_rng(0)
    for step in range(1, 30):
        for name in expected:
            value = rng.normal(size=3)
            getattr(model, name)[...] = jnp.float32(value)
            kept = min(0.6, (1 + step) / (10 + step))
            expected[name] = kept * expected[name] + (1 - kept) * value
        follow(average, model, decay=0.6, step=jnp.int32(step))
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(average, name)[...], value, 1e-5)


@pytest.mark.parametrize(
    "model",
    [
        base.Model(name="resnet_cifar", depth=8, width=4),
        base.Model(
            name="vit", depth=1, width=8, patch_size=4, num_heads=2, mlp_width=8
        ),
    ],
    ids=lambda model: model.name,
)
def test_layers_compute_in_bfloat16_and_weights_stay_in_float32(model):
    config = dataclasses.replace(small_runs.mlp(), model=model, dtype="bfloat16")
    training = prepare(config, DIGITS, DEVICE)
    weights = named_leaves(training.abstract["model"])
    assert {x.dtype for p, x in weights.items() if "key" not in p} == {
        jnp.dtype("float32")
    }
    batch = jax.eval_shape(lambda: {"image": jnp.zeros((8, 8, 8, 1), jnp.uint8)})
    forwards = lambda state, batch: training.tested(state)(
        DIGITS.normalize(batch["image"])
    )
    products = [*operands(jax.make_jaxpr(forwards)(training.abstract, batch))]
    assert products
    assert set(products) == {jnp.dtype("bfloat16")}


def operands(jaxpr):
    """Yield the dtypes of everything that is multiplied."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield from (variable.aval.dtype for variable in eqn.invars)
        for inner in jaxprs_in_params(eqn.params):
            yield from operands(inner)


def test_a_dtype_must_be_one_of_two():
    with pytest.raises(ValueError, match="'float32' or 'bfloat16', got 'int8'"):
        build.compute_in(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), "int8")
