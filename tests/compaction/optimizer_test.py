import jax
import jax.numpy as jnp
import numpy as np
import optax
import plans
import pytest
from flax import nnx

from sparsejax import sparse_optax
from sparsejax.compaction import (
    CompactionError,
    Plan,
    compact,
    slice_optimizer_state,
)
from sparsejax.compaction.rebuild import rebuild, take
from sparsejax.masks.layout import named_leaves


class Net(nnx.Module):
    def __init__(self, rngs):
        self.fc1 = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.fc2 = nnx.Linear(8, 2, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.fc2(nnx.relu(self.norm(self.fc1(x))))


GONE = [0, 5, 6]
REMOVED = {
    "fc1/kernel": {1: GONE},
    "fc1/bias": {0: GONE},
    "norm/scale": {0: GONE},
    "norm/bias": {0: GONE},
    "fc2/kernel": {0: GONE},
}


def masked_and_plan():
    full = plans.masked(plans.drawn(Net), REMOVED)
    return full, plans.plan_for(full, REMOVED)


def params_of(model):
    return nnx.as_pure(nnx.state(model, nnx.Param))


def step(model, tx, state, x):
    """One step of training of a module, its parameters in a pure tree."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    loss = lambda params: jnp.sum(jnp.square(nnx.merge(graphdef, params, rest)(x) - 1))
    params = nnx.as_pure(params)
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return nnx.merge(graphdef, optax.apply_updates(params, updates), rest), state


def batches(n):
    draw = np.random.default_rng(3).normal(size=(n, 4, 3))
    return jnp.asarray(draw, jnp.float32)


def only_what_is_left(tx, full):
    """Train nothing that the plan removes, as sparse training would."""
    mask = jax.tree.map(jnp.ones_like, params_of(full))
    mask = plans.masked(mask, REMOVED)
    return optax.chain(
        tx, optax.stateless(lambda u, _: jax.tree.map(jnp.multiply, u, mask))
    )


@pytest.mark.parametrize(
    "tx", [optax.sgd(0.01, momentum=0.9, nesterov=True), optax.adam(0.01)]
)
def test_training_goes_on_as_it_would_have(tx):
    full, plan = masked_and_plan()
    tx_full = only_what_is_left(tx, full)
    state = tx_full.init(params_of(full))
    first, *rest = batches(4)
    full, state = step(full, tx_full, state, first)
    small = rebuild(full, plan)
    small_state = slice_optimizer_state(state[0], full, plan)
    for x in rest:
        full, state = step(full, tx_full, state, x)
        small, small_state = step(small, tx, small_state, x)
    left = named_leaves(params_of(small))
    moved = named_leaves(params_of(masked_and_plan()[0]))
    for path, leaf in named_leaves(params_of(full)).items():
        expected = take(leaf, plan.keep[path])
        np.testing.assert_allclose(left[path], expected, rtol=1e-5, atol=1e-5)
        assert np.abs(expected - take(moved[path], plan.keep[path])).max() > 1e-3


def test_sparse_training_goes_on_with_the_masks_that_are_left():
    full, plan = masked_and_plan()
    ones = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params_of(full))
    masks = plans.masked(ones, REMOVED)
    masks["fc1"]["kernel"] = masks["fc1"]["kernel"].at[0, 1].set(False)
    masks = jax.tree.map(lambda m: m if m.ndim > 1 else None, masks)
    tx = sparse_optax.static(optax.adam(0.01), masks=masks)
    state = tx.init(params_of(full))
    first, second = batches(2)
    _, state = step(full, tx, state, first)
    small_state = slice_optimizer_state(state, full, plan)
    small, small_state = step(rebuild(full, plan), tx, small_state, second)
    left = sparse_optax.get_masks(small_state)
    assert left["fc1"]["kernel"].shape == small.fc1.kernel.shape == (3, 5)
    assert left["fc1"]["bias"] is None and left["fc2"]["kernel"].all()
    assert small.fc1.kernel[0, 0] == 0 and np.count_nonzero(small.fc1.kernel[...]) == 14


def test_an_nnx_optimizer_goes_on():
    full, plan = masked_and_plan()
    loss = lambda model, x: jnp.sum(jnp.square(model(x) - 1))
    optimizer = nnx.Optimizer(full, optax.adam(0.01), wrt=nnx.Param)
    first, second = batches(2)
    optimizer.update(full, nnx.grad(loss)(full, first))
    full = plans.masked(full, REMOVED)
    small = rebuild(full, plan)
    smaller = nnx.Optimizer(small, optax.adam(0.01), wrt=nnx.Param)
    state = slice_optimizer_state(optimizer.opt_state, full, plan)
    smaller.opt_state = nnx.data(state)
    optimizer.update(full, nnx.grad(loss)(full, second))
    smaller.update(small, nnx.grad(loss)(small, second))
    expected = take(full.fc1.kernel[...], plan.keep["fc1/kernel"])
    np.testing.assert_allclose(small.fc1.kernel[...], expected, rtol=1e-5, atol=1e-6)
    assert smaller.opt_state[0].mu["fc1"]["kernel"].shape == (3, 5)
    assert smaller.opt_state[0].count[...] == 2


def labels(params):
    return jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "vector", params)


TRANSFORMATIONS = {
    "chain": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.add_decayed_weights(1e-3),
        optax.scale_by_schedule(optax.constant_schedule(0.1)),
        optax.ema(0.9),
    ),
    "multi steps": optax.MultiSteps(optax.adamw(1e-3), 3).gradient_transformation(),
    "inject": optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9),
    "masked": optax.masked(
        optax.adam(0.1), lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    ),
    "partition": optax.partition(
        {"matrix": optax.adam(0.1), "vector": optax.sgd(0.1, momentum=0.9)}, labels
    ),
    "rigl": optax.chain(
        optax.identity(),
        sparse_optax.rigl(
            optax.rmsprop(0.1, momentum=0.9), sparsity=0.5, update_every=9
        ),
    ),
    "set": sparse_optax.set(optax.lion(0.1), sparsity=0.5, update_every=2),
    "magnitude": sparse_optax.magnitude(optax.adagrad(0.1), sparsity=0.5),
    "adafactor, not factored": optax.adafactor(0.1, momentum=0.9),
    "if finite": optax.chain(
        optax.trace(0.9), optax.apply_if_finite(optax.amsgrad(0.1), 3)
    ),
    "reduce on plateau": optax.contrib.reduce_on_plateau(),
}


@pytest.mark.parametrize("tx", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_the_state_is_the_one_of_a_smaller_model(tx):
    full, plan = masked_and_plan()
    state = jax.eval_shape(tx.init, params_of(full))
    sliced = slice_optimizer_state(state, params_of(full), plan)
    expected = jax.eval_shape(tx.init, params_of(rebuild(full, plan)))
    assert jax.tree.structure(sliced) == jax.tree.structure(expected)
    assert jax.tree.leaves(sliced) == jax.tree.leaves(expected)


def test_numbers_of_stacked_layers_stay():
    params = {"stack": {"kernel": jnp.ones((2, 3, 4))}}
    plan = plans.plan_for(params, {"stack/kernel": {2: [1, 2]}})
    state = {"budgets": {"stack": {"kernel": jnp.array([5, 6])}}, "mu": params}
    sliced = slice_optimizer_state(state, params, plan)
    assert sliced["budgets"]["stack"]["kernel"].tolist() == [5, 6]
    assert sliced["mu"]["stack"]["kernel"].shape == (2, 3, 2)


def test_a_slot_belongs_to_the_longest_path_it_ends_with():
    params = {
        "a": {"w": jnp.zeros((2, 2))},
        "w": jnp.zeros((2, 2)),
        "count": jnp.zeros(3),
    }
    plan = plans.plan_for(params, {"a/w": {0: [0]}, "w": {1: [0]}, "count": {0: [0]}})
    sliced = slice_optimizer_state(optax.adam(0.1).init(params), params, plan)
    mu = sliced[0].mu
    assert mu["a"]["w"].shape == (1, 2) and mu["w"].shape == (2, 1)
    assert mu["count"].shape == (2,) and sliced[0].count.shape == ()


def test_factored_slots_are_refused_where_they_shrink():
    params = {
        "fc": {"kernel": jnp.ones((8, 9)), "bias": jnp.ones(9)},
        "out": {"kernel": jnp.ones((9, 8))},
    }
    state = optax.adafactor(0.1, min_dim_size_to_factor=4).init(params)
    plan = plans.plan_for(params, {"fc/bias": {0: [1]}})
    sliced = slice_optimizer_state(state, params, plan)
    assert sliced[0].v["fc"]["bias"].shape == (8,)
    assert sliced[0].v_row["fc"]["kernel"].shape == (8,)
    plan = plans.plan_for(params, {"out/kernel": {0: [1]}})
    with pytest.raises(CompactionError, match=r"out/kernel must have .*\(9, 8\).*anew"):
        slice_optimizer_state(state, params, plan)


@pytest.mark.parametrize(
    ("state", "plan", "reason"),
    [
        (
            {"mu": {"fc": {"kernel": jnp.ones((3, 2))}}},
            Plan({"fc/kernel": (None, np.array([0, 2]))}),
            r"mu/fc/kernel: .* the full parameter, \(3, 4\), .* got \(3, 2\)",
        ),
        (
            {"history": {"fc": {"kernel": jnp.ones((5, 3, 4))}}},
            Plan({"fc/kernel": (None, np.array([0, 2]))}),
            r"history/fc/kernel: .* got \(5, 3, 4\)",
        ),
        (
            {"mu": {"fc": {"kernel": jnp.ones((3, 4))}}},
            Plan({"fc/kernel": (None, np.array([0, 7]))}),
            "another model",
        ),
        (
            {"mu": {"fc": {"kernel": jnp.ones((3, 4))}}},
            Plan({}, folds={"fc/kernel": np.ones(4)}),
            "gives fc/kernel a bias",
        ),
    ],
)
def test_states_that_do_not_fit_are_refused(state, plan, reason):
    params = {"fc": {"kernel": jnp.ones((3, 4))}}
    with pytest.raises(CompactionError, match=reason):
        slice_optimizer_state(state, params, plan)


def test_compact_slices_the_state_along():
    full, plan = masked_and_plan()
    state = optax.adam(0.1).init(params_of(full))
    small, small_state, report = compact(full, jnp.ones((2, 3)), opt_state=state)
    expected = optax.adam(0.1).init(params_of(small))
    jax.tree.map(np.testing.assert_array_equal, small_state, expected)
    assert report.removed == {"fc1": 3} and small.norm.full_features == 8
