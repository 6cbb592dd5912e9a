import types

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks.coupled import coupled_masks, live_channels


def member(path, axis, role, channels):
    return types.SimpleNamespace(
        path=path, axis=axis, role=role, channels=np.asarray(channels)
    )


# Two layers write into three channels; the second into one of them twice, and beside.
GROUP = types.SimpleNamespace(
    name="stream",
    size=3,
    members=(
        member("a", 1, "producer", [0, 1, 2]),
        member("b", 0, "producer", [2, -1, 2, 0]),
        member("scale", 0, "norm", [0, 1, 2]),
        member("mean", 0, "statistic", [0, 1, 2]),
        member("flat", 0, "consumer", [0, 0, 1, 1, 2, 2, -1]),
    ),
)


def rows(shape, axis, active):
    """Make a mask with one active weight in each of some slices."""
    mask = np.zeros(shape, bool)
    for index in active:
        np.moveaxis(mask, axis, 0)[index].flat[-1] = True
    return jnp.asarray(mask)


@pytest.mark.parametrize(
    ("in_a", "in_b", "live"),
    [
        ([0, 1, 2], [], [0, 1, 2]),
        ([], [], []),
        ([1], [], [1]),
        ([], [0], [2]),
        ([], [2], [2]),
        ([1], [1], [1]),
        ([0], [2, 3], [0, 2]),
    ],
)
def test_a_channel_lives_while_some_layer_writes_into_it(in_a, in_b, live):
    masks = {"a": rows((5, 3), 1, in_a), "b": rows((4, 2, 6), 0, in_b)}
    found = live_channels(GROUP, masks)
    assert np.flatnonzero(found).tolist() == live and found.shape == (3,)


@pytest.mark.parametrize("masks", [{}, {"a": rows((5, 3), 1, [0])}])
def test_a_dense_producer_keeps_all_alive(masks):
    assert live_channels(GROUP, masks).all()


def test_members_of_the_roles_are_masked():
    leaves = {
        "a": jnp.ones((5, 3)),
        "scale": jnp.ones(3),
        "mean": jnp.ones(3),
        "flat": jnp.ones((7, 2)),
    }
    live = {"stream": jnp.array([True, False, True])}
    found = coupled_masks([GROUP], live, leaves, ["norm"])
    assert {path: mask.tolist() for path, mask in found.items()} == {
        "scale": [True, False, True]
    }
    found = coupled_masks([GROUP], live, leaves, ["norm", "consumer", "producer"])
    assert set(found) == {"a", "scale", "flat"}
    for mask in (found["a"].T, found["flat"]):
        assert (mask.all(axis=1) == mask.any(axis=1)).all()
    assert found["flat"][:, 0].tolist() == [True, True, False, False, True, True, True]
    assert found["a"][0].tolist() == [True, False, True]
    assert coupled_masks([GROUP], {}, leaves, ["norm"]) == {}


def test_what_belongs_to_two_groups_is_masked_by_both():
    groups = [
        types.SimpleNamespace(
            name=name, size=n, members=(member("x", i, "norm", range(n)),)
        )
        for i, (name, n) in enumerate([("rows", 2), ("columns", 3)])
    ]
    live = {"rows": jnp.array([True, False]), "columns": jnp.array([False, True, True])}
    found = coupled_masks(groups, live, {"x": jnp.ones((2, 3))}, ["norm"])
    assert found["x"].astype(int).tolist() == [[0, 1, 1], [0, 0, 0]]
