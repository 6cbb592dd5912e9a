"""States: how masks are drawn, found again, applied, and what else a state is."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract_cases import ALGORITHMS, by_path
from flax import nnx
from flax.training.train_state import TrainState

from sparsejax import sparse_optax
from sparsejax.masks import Layout

SGD = optax.sgd(0.1, momentum=0.9)


def draw(shapes, seed=0):
    rng = np.random.default_rng(seed)
    draw_one = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return jax.tree.map(draw_one, shapes, is_leaf=lambda x: isinstance(x, tuple))


PARAMS = draw(
    {
        "encoder": {"kernel": (16, 8), "bias": (8,)},
        "head": {"kernel": (8, 12)},
        "embed": {"embedding": (5, 8)},
    }
)
assert_equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)


def rigl(inner=SGD, **options):
    return sparse_optax.rigl(inner, **{"sparsity": 0.5, **options})


# Drawing


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_init_is_the_same_compiled_and_without_values(algorithm):
    tx = ALGORITHMS[algorithm].build(SGD)
    state = tx.init(PARAMS)
    assert_equal(jax.jit(tx.init)(PARAMS), state)
    like = lambda x: (x.shape, x.dtype)
    abstract = jax.eval_shape(tx.init, jax.eval_shape(lambda: PARAMS))
    assert jax.tree.map(like, abstract) == jax.tree.map(like, state)


@pytest.mark.parametrize("name", ["static", "set", "rigl"])
def test_the_key_draws_the_masks(name):
    factory = functools.partial(getattr(sparse_optax, name), SGD, sparsity=0.5)
    masks = lambda key: sparse_optax.get_masks(factory(key=key).init(PARAMS))
    assert_equal(masks(jax.random.key(1)), masks(jax.random.PRNGKey(1)))
    assert_equal(masks(None), masks(jax.random.key(0)))
    a, b = masks(jax.random.key(1)), masks(jax.random.key(2))
    assert (a["head"]["kernel"] != b["head"]["kernel"]).any()


def test_a_mask_depends_on_its_own_leaf_alone():
    tx = rigl(distribution="uniform")
    masks = sparse_optax.get_masks(tx.init(PARAMS))
    alone = sparse_optax.get_masks(tx.init({"head": PARAMS["head"]}))
    assert_equal(alone["head"], masks["head"])
    twice = {"a": PARAMS["head"], "b": PARAMS["head"]}
    masks = sparse_optax.get_masks(tx.init(twice))
    assert (masks["a"]["kernel"] != masks["b"]["kernel"]).any()


def test_set_draws_anew_at_every_update_and_for_every_leaf():
    kernel = PARAMS["head"]["kernel"]
    params = {"a": kernel, "b": kernel}
    tx = sparse_optax.set(SGD, sparsity=0.5, drop_fraction=0.5, update_every=1)
    mask = jnp.arange(kernel.size).reshape(kernel.shape) % 2 == 0
    state = tx.init(params)._replace(masks={"a": mask, "b": mask})
    update = jax.jit(tx.update)
    after = [
        update(params, state._replace(count=jnp.int32(n)), params)[1].masks
        for n in (1, 1, 2)
    ]
    assert_equal(after[0], after[1])
    assert (after[0]["a"] != after[2]["a"]).any()
    assert (after[0]["a"] != after[0]["b"]).any()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_donated_state_takes_nothing_along(algorithm):
    key = jax.random.key(3)
    tx = ALGORITHMS[algorithm].build(SGD, key=key)
    step = jax.jit(tx.update, donate_argnums=1)
    results = [step(PARAMS, tx.init(PARAMS), PARAMS) for _ in range(2)]
    assert_equal(*results)
    assert not key.is_deleted()


def test_given_masks_survive_the_donation_of_a_state():
    masks = {"head": {"kernel": PARAMS["head"]["kernel"] > 0}}
    tx = sparse_optax.static(SGD, masks=masks)
    step = jax.jit(tx.update, donate_argnums=1)
    results = [step(PARAMS, tx.init(PARAMS), PARAMS) for _ in range(2)]
    assert_equal(*results)
    assert_equal(sparse_optax.get_masks(results[0][1])["head"], masks["head"])


# Finding


WRAPPERS = {
    "chain": lambda tx: optax.chain(
        optax.clip_by_global_norm(1.0), tx, optax.identity()
    ),
    "multisteps": lambda tx: optax.MultiSteps(tx, 2),
    "hyperparams": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.chain(tx, optax.scale(rate))
    )(rate=0.1),
    "masked": lambda tx: optax.masked(
        tx, {"encoder": True, "head": True, "embed": False}
    ),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


@pytest.mark.parametrize("outer", WRAPPERS)
@pytest.mark.parametrize("inner", WRAPPERS)
def test_masks_are_found_at_any_depth(inner, outer):
    tx = rigl()
    expected = sparse_optax.get_masks(tx.init(PARAMS))
    nested = WRAPPERS[outer](WRAPPERS[inner](tx))
    masks = sparse_optax.get_masks(nested.init(PARAMS))
    assert_equal(
        [masks["encoder"], masks["head"]], [expected["encoder"], expected["head"]]
    )
    assert jax.tree.leaves(masks["embed"]) == []


PREFIX = {"encoder": "rigl", "head": "static", "embed": "dense"}


@pytest.mark.parametrize("labels", [PREFIX, lambda params: label(params)])
def test_masks_of_a_partition_are_merged(labels):
    parts = {
        "rigl": rigl(),
        "static": sparse_optax.static(SGD, sparsity=0.75),
        "dense": SGD,
    }
    tx = optax.partition(parts, labels)
    state = tx.init(PARAMS)
    masks = sparse_optax.get_masks(state)
    assert masks["encoder"]["bias"] is None
    assert masks["encoder"]["kernel"].sum() == 64
    assert masks["head"]["kernel"].sum() == 24
    assert jax.tree.leaves(masks["embed"]) == []
    params = sparse_optax.apply_masks(PARAMS, state)
    updates, state = jax.jit(tx.update)(PARAMS, state, params)
    params = optax.apply_updates(params, updates)
    for name in ("encoder", "head"):
        np.testing.assert_array_equal(
            params[name]["kernel"] != 0, masks[name]["kernel"]
        )


def label(params):
    same = lambda name, part: jax.tree.map(lambda _: PREFIX[name], part)
    return {name: same(name, part) for name, part in params.items()}


def test_masks_are_found_in_a_whole_training_state():
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=rigl())
    masks = sparse_optax.get_masks(state)
    assert_equal(masks, sparse_optax.get_masks(state.opt_state))


# Applying


def test_apply_masks_zeroes_what_is_off_the_mask_and_nothing_else():
    state = rigl().init(PARAMS)
    mask = sparse_optax.get_masks(state)["head"]["kernel"]
    spoiled = PARAMS | {
        "head": {"kernel": jnp.where(mask, PARAMS["head"]["kernel"], jnp.nan)}
    }
    for params in (PARAMS, spoiled):
        applied = sparse_optax.apply_masks(params, state)
        expected = jnp.where(mask, PARAMS["head"]["kernel"], 0)
        np.testing.assert_array_equal(applied["head"]["kernel"], expected)
        assert_equal(applied["embed"], PARAMS["embed"])
        assert_equal(applied["encoder"]["bias"], PARAMS["encoder"]["bias"])


def test_apply_masks_keeps_the_boxes_of_nnx_and_linen():
    model = nnx.Linear(8, 12, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, rigl(), wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    applied = sparse_optax.apply_masks(params, optimizer.opt_state)
    assert jax.tree.structure(applied) == jax.tree.structure(params)
    nnx.update(model, applied)
    assert int((model.kernel[...] != 0).sum()) == 48

    boxed = {"kernel": nn.Partitioned(PARAMS["head"]["kernel"], names=(None, None))}
    tx = rigl()
    state = tx.init(boxed)
    applied = sparse_optax.apply_masks(boxed, state)
    updates, state = jax.jit(tx.update)(boxed, state, applied)
    applied = optax.apply_updates(applied, updates)
    assert jax.tree.structure(applied) == jax.tree.structure(boxed)
    assert int((applied["kernel"].value != 0).sum()) == 48


# Starting afresh

FAN_IN = {"fc/kernel": 0, "attention/query/kernel": 0, "attention/out/kernel": (0, 1)}


@pytest.mark.parametrize("variant", ["variance", "std"])
def test_reinitialize_draws_for_each_fan_in(variant):
    params = draw({"fc": {"kernel": (400, 300), "bias": (300,)}}) | {
        "attention": {"query": {"kernel": jnp.zeros((64, 8, 32), jnp.bfloat16)}}
    }
    params["attention"]["out"] = {"kernel": jnp.zeros((8, 32, 64), jnp.bfloat16)}
    state = sparse_optax.static(sparsity=0.9).init(params)
    masks = sparse_optax.get_masks(state)
    new = sparse_optax.reinitialize(
        params, state, key=jax.random.key(1), variant=variant
    )
    assert_equal(new["fc"]["bias"], params["fc"]["bias"])
    for path, axes in FAN_IN.items():
        kernel, mask = by_path(new)[path], np.asarray(by_path(masks)[path])
        assert kernel.dtype == by_path(params)[path].dtype
        np.testing.assert_array_equal(kernel != 0, mask)
        k = np.maximum(mask.sum(axes, keepdims=True), 1)
        std = np.sqrt(2 / k) if variant == "variance" else 2 / k
        normal = (np.asarray(kernel, np.float32) / std)[mask]
        n = normal.size
        assert abs(normal.mean()) < 4 / np.sqrt(n)
        assert abs(normal.var() - 1) < 4 * np.sqrt(2 / n) + 0.005
        few = (np.broadcast_to(k, mask.shape) < np.median(k))[mask]
        assert abs(normal[few].var() / normal[~few].var() - 1) < 0.1


def test_reinitialize_keeps_dense_leaves_and_follows_key_and_layout():
    params = {
        "small": jnp.ones((2, 2)),
        "a": jnp.ones((64, 32)),
        "b": jnp.ones((64, 32)),
    }
    state = sparse_optax.static(sparsity=0.5).init(params)
    assert sparse_optax.get_masks(state)["small"].all()
    fresh = functools.partial(sparse_optax.reinitialize, params, state)
    new = fresh(key=jax.random.key(0))
    assert_equal(new["small"], params["small"])
    assert_equal(new, fresh(key=jax.random.key(0)))
    assert (new["a"] != fresh(key=jax.random.key(1))["a"]).any()
    both = (new["a"] != 0) & (new["b"] != 0)
    assert (new["a"] != new["b"])[both].all()
    turned = fresh(key=jax.random.key(0), layout={"a": Layout((0,), (1,))})
    assert_equal(turned["b"], new["b"])
    # The same draws, scaled by the fan-in of rows and not of columns.
    mask = np.asarray(new["a"] != 0)
    ratio = np.sqrt(mask.sum(0, keepdims=True) / mask.sum(1, keepdims=True))
    np.testing.assert_allclose((turned["a"] / new["a"])[mask], ratio[mask], rtol=1e-5)
