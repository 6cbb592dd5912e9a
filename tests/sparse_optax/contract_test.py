"""The contract: what every algorithm promises with every optimizer, in every tree."""

import functools
import itertools

import contract_cases
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import optax
import pytest
from contract_cases import ALGORITHMS, OPTIMIZERS, TREES, by_path

from sparsejax import sparse_optax

# Every pair of algorithm and optimizer, of algorithm and tree, of optimizer and tree.
CASES = [
    pytest.param(
        algorithm,
        optimizer,
        list(TREES)[(i + j) % len(TREES)],
        marks=contract_cases.marks(algorithm) if j % 4 else [],
    )
    for i, algorithm in enumerate(ALGORITHMS)
    for j, optimizer in enumerate(OPTIMIZERS)
]


@pytest.mark.parametrize(("algorithm", "optimizer", "tree"), CASES)
def test_contract_holds_at_every_step(algorithm, optimizer, tree):
    algorithm, optimizer = ALGORITHMS[algorithm], OPTIMIZERS[optimizer]
    run = contract_cases.train(algorithm, optimizer, TREES[tree])
    assert run.traces == 1
    check_counts(run, algorithm, optimizer)
    check_zeros(run, optimizer)
    check_schedule(run, algorithm, optimizer)
    if optimizer.inner is not None:
        check_steps(run, algorithm, optimizer)


def check_counts(run, algorithm, optimizer):
    """Check which leaves are sparse, and how many of their weights are active."""
    for call, now in enumerate(run.snapshots):
        count = call // optimizer.calls_per_step
        assert now.state.count == count
        assert set(by_path(now.masks)) == set(by_path(now.params))
        active = {path: int(mask.sum()) for path, mask in sparse_masks(now).items()}
        assert set(active) == set(run.layers)
        if algorithm.together:
            active = {"": sum(active.values())}
        assert active == contract_cases.active_after(algorithm, run.layers, count)


def check_zeros(run, optimizer):
    """Check that nothing is left off the mask, and that NaN got nowhere."""
    dtypes = jax.tree.map(lambda x: x.dtype, run.snapshots[0].params)
    for now in run.snapshots:
        params = by_path(now.params)
        assert jax.tree.map(lambda x: x.dtype, now.params) == dtypes
        assert all(np.isfinite(x.astype(np.float32)).all() for x in params.values())
        for path, mask in sparse_masks(now).items():
            assert (params[path][~mask] == 0).all(), path
            leaves = jax.tree.leaves(now.state.inner_state)
            slots = [x for x in leaves if x.shape == mask.shape]
            assert len(slots) >= optimizer.slots
            assert all((abs(x[~mask]) <= optimizer.empty).all() for x in slots), path


def check_schedule(run, algorithm, optimizer):
    """Check that masks change at every event and at no other call."""
    changed = []
    for call, (before, now) in enumerate(itertools.pairwise(run.snapshots)):
        old, new = sparse_masks(before), sparse_masks(now)
        if any((old[path] != new[path]).any() for path in new):
            changed.append(call)
        if algorithm.prunes:
            assert all((old[path] | ~new[path]).all() for path in new)
    n = optimizer.calls_per_step
    assert changed == [event * n + n - 1 for event in algorithm.events]


def check_steps(run, algorithm, optimizer):
    """Check every call against the inner optimizer run by hand.

    A weight that stays active goes on with its slots, one that has just grown starts
    from 0 without. A call that skips the optimizer leaves all else as it is, bit for
    bit.
    """
    update = jax.jit(optax.with_extra_args_support(optimizer.inner).update)

    def step(grads, params, slots):
        updates, slots = update(grads, slots, params)
        return jax.device_get((optax.apply_updates(params, updates), slots))

    for call, (before, now) in enumerate(itertools.pairwise(run.snapshots)):
        start = before.params, before.state.inner_state
        params, slots = now.params, now.state.inner_state
        if algorithm.skips and call in algorithm.events:
            exact = functools.partial(assert_close, rtol=0, atol=optimizer.empty)
            expected = joined(before, now, start, cleared(now, start))
            jax.tree.map(exact, (params, slots), expected)
            continue
        seen = lambda mask, g: g if mask is None else np.where(mask, g, 0)
        grads = jax.tree.map(seen, now.masks, now.grads, is_leaf=lambda x: x is None)
        goes_on = step(grads, *start)
        starts = step(grads, start[0], cleared(now, start[1]))
        expected = joined(before, now, goes_on, starts)
        jax.tree.map(assert_close, slots, expected[1])
        if optimizer.elementwise:
            jax.tree.map(assert_close, params, expected[0])


def cleared(now, tree):
    """Return a tree with zeros in all that has the shape of a sparse leaf."""
    shapes = {mask.shape for mask in sparse_masks(now).values()}
    return jax.tree.map(lambda x: np.zeros_like(x) if x.shape in shapes else x, tree)


def joined(before, now, goes_on, starts):
    """Return a tree of what stays active, what has just grown, and zeros elsewhere."""
    old, new = sparse_masks(before), sparse_masks(now)
    masks = {new[path].shape: (new[path], old[path]) for path in new}

    def leaf(x, y):
        active, was_active = masks.get(x.shape, (True, True))
        return np.where(active, np.where(was_active, x, y), np.zeros_like(x))

    return jax.tree.map(leaf, goes_on, starts)


def sparse_masks(snapshot):
    return {path: m for path, m in by_path(snapshot.masks).items() if m is not None}


def assert_close(actual, expected, *, rtol=None, atol=1e-7):
    rtol = {2: 1e-2, 4: 1e-5}[actual.dtype.itemsize] if rtol is None else rtol
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol, atol)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_between_events_nothing_is_searched(algorithm):
    """Check it under vmap, with steps that differ, where a select could stand in."""
    algorithm = ALGORITHMS[algorithm]
    tx = algorithm.build(optax.sgd(0.1, momentum=0.9))
    params = {"kernel": jnp.ones((3, 8, 4)), "bias": jnp.ones((3, 4))}
    states = jax.vmap(tx.init)(params)
    update = jax.vmap(tx.update)
    outside, inside = jaxprs.outside_and_inside(update, params, states, params)
    assert not {"while", "scan", "sort", "top_k", "reduce", "gather"} & outside
    assert not any("callback" in name for name in outside | inside)
    assert ("cond" in outside) == ("while" in inside) == bool(algorithm.events)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_nan_gradient_is_never_grown(accumulate):
    params = {"kernel": jnp.arange(1.0, 65.0).reshape(8, 8)}
    tx = sparse_optax.rigl(
        optax.sgd(0.1),
        sparsity=0.5,
        drop_fraction=0.5,
        update_every=2,
        accumulate=accumulate,
    )
    state = tx.init(params)
    update = jax.jit(tx.update)
    first = sparse_optax.get_masks(state)["kernel"]
    for _ in range(5):
        masks = sparse_optax.get_masks(state)
        grads = jax.tree.map(lambda m: jnp.where(m, 1.0, jnp.nan), masks)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    kernel = params["kernel"]
    assert jnp.isfinite(kernel).all()
    np.testing.assert_array_equal(sparse_optax.get_masks(state)["kernel"], first)
    np.testing.assert_array_equal(kernel != 0, first)
