"""SRigL on a network: what goes with ablated neurons, and compaction after it."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsejax import analysis, compaction, models, sparse_optax


class Net(nnx.Module):
    """Convolutions with BatchNorm, one of them residual, and a linear hidden layer."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, rngs=rngs)
        self.conv2 = nnx.Conv(16, 16, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(16, rngs=rngs)
        self.hidden = nnx.Linear(16, 24, rngs=rngs)
        self.head = nnx.Linear(24, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(x + self.norm2(self.conv2(x)))
        return self.head(nnx.relu(self.hidden(x.mean(axis=(1, 2)))))


IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


@functools.cache
def groups_of_net():
    model = Net(nnx.Rngs(0))
    model.eval()
    return compaction.channel_groups(model, IMAGES)


@functools.cache
def trained_net():
    """Train on random images until neurons have died; return model and optimizer."""
    model = Net(nnx.Rngs(0))
    tx = sparse_optax.srigl(
        optax.adamw(3e-3),
        sparsity=0.8,
        gamma=0.9,
        groups=groups_of_net(),
        update_every=4,
        stop_at=36,
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(32, 8, 8, 3)), jnp.float32)
    classes = jnp.asarray(rng.integers(0, 4, 32))

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = model(images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
            return losses.mean()

        grads = nnx.grad(loss)(model)
        optimizer.update(model, grads)

    for _ in range(40):
        step(model, optimizer)
    model.eval()
    return model, optimizer


def by_path(tree):
    pure = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    leaves, _ = jax.tree.flatten_with_path(pure, is_leaf=lambda x: x is None)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}


def test_what_ablated_channels_emit_is_masked():
    model, optimizer = trained_net()
    masks = by_path(sparse_optax.get_masks(nnx.as_pure(optimizer.opt_state)))
    params = by_path(nnx.as_pure(nnx.state(model, nnx.Param)))
    live = lambda path: np.asarray(
        masks[path].any(axis=(0, 1, 2)[: masks[path].ndim - 1])
    )
    # The two convolutions add up to one stream; the other two have their own channels.
    stream = live("conv1/kernel") | live("conv2/kernel")
    vectors = {
        "conv1/bias": stream,
        "norm1/scale": stream,
        "norm1/bias": stream,
        "norm2/scale": stream,
        "norm2/bias": stream,
        "hidden/bias": live("hidden/kernel"),
    }
    assert {path for path, m in masks.items() if m is not None and m.ndim == 1} == {
        *vectors
    }
    assert masks["head/bias"] is None and live("head/kernel").all()
    for path, alive in vectors.items():
        np.testing.assert_array_equal(masks[path], alive, err_msg=path)
        assert (np.asarray(params[path])[~alive] == 0).all(), path
        slots = [
            by_path(slot)[path]
            for slot in nnx.as_pure(optimizer.opt_state).inner_state[0][1:]
        ]
        assert len(slots) == 2 and all((s[~alive] == 0).all() for s in slots)
    assert not live("hidden/kernel").all()


def test_compaction_removes_exactly_what_was_ablated():
    model, optimizer = trained_net()
    masks = by_path(sparse_optax.get_masks(nnx.as_pure(optimizer.opt_state)))
    small, report = compaction.compact(model, IMAGES)
    dead = {
        name: int((~masks[path]).sum())
        for name, path in (("conv1", "norm1/scale"), ("hidden", "hidden/bias"))
    }
    assert report.removed == {name: n for name, n in dead.items() if n}
    assert dead["hidden"] > 0
    assert small.hidden.out_features == 24 - dead["hidden"]
    assert report.max_error <= 1e-5 * max(report.scale, 1.0)


def test_masks_of_vectors_have_no_budget_and_show_in_the_summary():
    model = Net(nnx.Rngs(0))
    tx = sparse_optax.srigl(sparsity=0.5, groups=groups_of_net())
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    state = tx.init(params)
    weights = {
        path for path, n in by_path(state.budgets.weights).items() if n is not None
    }
    assert weights == {
        f"{name}/kernel" for name in ("conv1", "conv2", "hidden", "head")
    }
    table = analysis.summary(params, sparse_optax.get_masks(state))
    (row,) = (line.split() for line in table.split("\n") if "norm1/scale" in line)
    assert row[1:] == ["16", "16", "16", "100.00%"]


def test_groups_of_another_model_are_refused():
    other = models.MLP(5, (7,), 3, rngs=nnx.Rngs(0))
    report = compaction.channel_groups(other, jax.ShapeDtypeStruct((1, 5), jnp.float32))
    params = {"layers": [{"kernel": jnp.ones((5, 9))}, {"kernel": jnp.ones((9, 3))}]}
    with pytest.raises(
        ValueError, match="(?s)groups=.*7 indices.*layers/0/bias.*no such"
    ):
        sparse_optax.srigl(sparsity=0.5, groups=report).init(params)


def test_a_channel_of_several_layers_dies_with_the_last_of_them():
    member = lambda path, axis, role: types.SimpleNamespace(
        path=path, axis=axis, role=role, channels=np.arange(4)
    )
    members = [member(p, 1, "producer") for p in ("a", "b")]
    group = types.SimpleNamespace(
        name="a", size=4, pinned=None, members=(*members, member("scale", 0, "norm"))
    )
    params = {"a": jnp.ones((6, 4)), "b": jnp.ones((6, 4)), "scale": jnp.ones(4)}
    tx = sparse_optax.srigl(
        optax.sgd(0.05), sparsity=0.8, gamma=0.6, groups=[group], update_every=1
    )
    state = tx.init(params)
    alive = {
        "a": jnp.array([True, True, False, False]),
        "b": jnp.array([True, False, True, False]),
    }
    masks = {n: state.masks[n] & own[None] for n, own in alive.items()}
    state = state._replace(masks=state.masks | masks, count=jnp.int32(1))
    params = sparse_optax.apply_masks(params, state)
    grads = {n: own[None] * jnp.ones((6, 4)) for n, own in alive.items()}
    _, state = tx.update(grads | {"scale": jnp.ones(4)}, state, params)
    masks = sparse_optax.get_masks(state)
    for name, own in alive.items():
        np.testing.assert_array_equal(masks[name].any(axis=0), own)
    assert masks["scale"].tolist() == [True, True, True, False]
