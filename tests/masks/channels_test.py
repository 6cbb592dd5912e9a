"""Channels against slow loops: their scores, which of them go, and what grows."""

import functools
from types import SimpleNamespace

import chase_oracles
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from sparsejax.masks import Layout, channels

# Removal

SIZES = (4, 1, 7, 3)
CASES = 600


@functools.cache
def cases():
    """Draw scores that often tie, live channels, floors and how many are to stay."""
    rng = np.random.default_rng(0)
    scores = [rng.integers(0, 6, (CASES, n)).astype(np.float32) / 4 for n in SIZES]
    distinct = [rng.normal(size=(CASES, n)).astype(np.float32) for n in SIZES]
    half = np.arange(CASES)[:, None] % 2 == 0
    scores = [np.where(half, a, b) for a, b in zip(scores, distinct, strict=True)]
    live = [rng.random((CASES, n)) < rng.random((CASES, 1)) for n in SIZES]
    floors = np.stack([rng.integers(0, n + 1, CASES) for n in SIZES], axis=1)
    keep = rng.integers(0, sum(SIZES) + 2, CASES)
    return scores, live, keep, floors


def test_removal_equals_the_iterated_thresholds():
    scores, live, keep, floors = cases()
    found = jax.jit(jax.vmap(channels.remove))(scores, live, keep, floors)
    bound = 0
    for i in range(CASES):
        at = lambda arrays, i=i: [one[i] for one in arrays]
        expected = chase_oracles.remove(at(scores), at(live), keep[i], floors[i])
        for group, one in enumerate(expected):
            np.testing.assert_array_equal(found[group][i], one)
        left = sum(int(one.sum()) for one in expected)
        bound += left != min(keep[i], sum(int(one.sum()) for one in at(live)))
    assert 50 < bound < CASES / 2  # floors decide often, and often do not


def test_removal_keeps_exactly_as_many_as_asked_for():
    scores, live, keep, _ = cases()
    everything = [np.ones_like(one) for one in live]
    none = np.zeros(len(SIZES), np.int32)
    remove = jax.vmap(channels.remove, in_axes=(0, 0, 0, None))
    found = remove(scores, everything, keep, none)
    left = sum(np.asarray(one).sum(axis=1) for one in found)
    np.testing.assert_array_equal(left, np.minimum(keep, sum(SIZES)))


def test_removal_in_each_group_by_itself():
    scores, live, _, floors = cases()
    keep = np.random.default_rng(1).integers(0, 5, floors.shape)
    found = jax.jit(jax.vmap(channels.remove))(scores, live, keep, floors)
    for group, own in enumerate(found):
        for i in range(CASES):
            one = [scores[group][i]], [live[group][i]]
            (expected,) = chase_oracles.remove(*one, keep[i, group], [floors[i, group]])
            np.testing.assert_array_equal(own[i], expected)


def test_the_order_of_channels_does_not_matter():
    rng = np.random.default_rng(2)
    scores = [rng.normal(size=n).astype(np.float32) for n in SIZES]
    live = [np.ones(n, bool) for n in SIZES]
    orders = [rng.permutation(n) for n in SIZES]
    floors = jnp.array([1, 0, 2, 1])
    permuted = lambda arrays: [x[o] for x, o in zip(arrays, orders, strict=True)]
    found = channels.remove(scores, live, 8, floors)
    again = channels.remove(permuted(scores), live, 8, floors)
    jax.tree.map(np.testing.assert_array_equal, again, permuted(found))


def test_equal_scores_go_in_order_and_a_nan_goes_last():
    scores = [jnp.array([1.0, jnp.nan, 1.0]), jnp.array([1.0, jnp.inf])]
    live = [jnp.ones(3, bool), jnp.ones(2, bool)]
    left = lambda keep: [
        "".join("01"[int(x)] for x in one)
        for one in channels.remove(scores, live, keep, jnp.zeros(2, jnp.int32))
    ]
    assert [left(k) for k in (4, 3, 2, 1, 0)] == [
        ["011", "11"],
        ["010", "11"],
        ["010", "01"],
        ["010", "00"],
        ["000", "00"],
    ]


# Scores


def member(path, axis, index, role="producer"):
    return SimpleNamespace(path=path, axis=axis, role=role, channels=np.array(index))


GROUPS = {
    "convolution": (5, [member("conv", 3, range(5))]),
    "linear": (6, [member("fc", 1, range(6)), member("bias", 0, range(6), "norm")]),
    "gate": (3, [member("fc", 1, [0, 1, 2, 0, 1, 2])]),
    "part": (2, [member("fc", 1, [-1, 1, -1, 0, -1, -1])]),
    "stream": (5, [member("conv", 3, range(5)), member("turned", 0, range(5))]),
}
SHAPES = {"conv": (3, 2, 4, 5), "fc": (7, 6), "turned": (5, 4), "bias": (6,)}
SPATIAL = {"conv": 2, "fc": 0, "turned": 0}


@functools.cache
def arrays():
    rng = np.random.default_rng(3)
    weights = {p: rng.normal(size=s).astype(np.float32) for p, s in SHAPES.items()}
    masks = {p: rng.random(s) < 0.3 for p, s in SHAPES.items()}
    masks["conv"][..., 1] = False
    masks["turned"][1] = False
    return weights, masks


@pytest.mark.parametrize("criterion", channels.CRITERIA)
@pytest.mark.parametrize("name", GROUPS)
def test_scores_equal_loops_over_channels(name, criterion):
    size, members = GROUPS[name]
    group = SimpleNamespace(name=name, size=size, members=members)
    weights, masks = arrays()
    layouts = {"turned": Layout(outputs=(0,), inputs=(1,))}
    found = channels.scores(group, weights, masks, criterion=criterion, layouts=layouts)
    assert found.dtype == jnp.float32
    expected = chase_oracles.score(group, weights, masks, criterion, SPATIAL)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    if name in ("convolution", "stream"):
        assert found[1] == 0  # it has no active weight, and is no NaN


def test_umm_counts_what_is_masked_and_what_was_removed():
    """The denominator stays; twice the density at one magnitude is twice the score."""
    group = SimpleNamespace(name="fc", size=3, members=[member("fc", 1, range(3))])
    weight = np.full((8, 3), -0.5, np.float32)
    mask = np.zeros((8, 3), bool)
    mask[:2, 0] = mask[:4, 1] = mask[:, 2] = True
    score = lambda mask: channels.scores(group, {"fc": weight}, {"fc": mask}).tolist()
    assert score(mask) == [0.125, 0.25, 0.5]
    removed = mask & (np.arange(8) < 4)[:, None]
    assert score(removed) == [0.125, 0.25, 0.25]


def test_an_unknown_criterion_is_refused():
    group = SimpleNamespace(name="fc", size=6, members=GROUPS["linear"][1])
    with pytest.raises(ValueError, match="criterion must be one of .*umm.*'random'"):
        channels.scores(group, *arrays(), criterion="random")


# Exploration


SLICES = {"a": (4, 5), "b": (3, 2, 6)}


def draw(rng, ties):
    """Draw masks, weights and gradients, of few values where they are to tie."""
    many = lambda s: rng.normal(size=s).astype(np.float32)
    few = lambda s: rng.integers(-3, 4, s).astype(np.float32)
    value = few if ties else many
    masks = {p: rng.random(s) < 0.5 for p, s in SLICES.items()}
    weights = {p: np.where(m, value(m.shape), 0) for p, m in masks.items()}
    gradients = {p: value(s) * (rng.random(s) < 0.8) for p, s in SLICES.items()}
    gradients["a"][0] = np.nan
    return masks, weights, {p: np.float32(g) for p, g in gradients.items()}


def together(tree):
    return [jnp.asarray(tree[path]) for path in SLICES]


@jax.jit
def explore(masks, weights, gradients, keep, total):
    return channels.drop_and_grow_together(
        masks, weights, gradients, keep=keep, total=total
    )


@pytest.mark.parametrize("ties", [False, True])
def test_exploration_equals_sorting(ties):
    rng = np.random.default_rng(4)
    for _ in range(40):
        masks, weights, gradients = draw(rng, ties)
        keep, total = sorted(rng.integers(0, 60, 2))
        drawn = masks, weights, gradients
        found = explore(*map(together, drawn), keep, total)
        expected = chase_oracles.explore(*drawn, keep, total)
        jax.tree.map(np.testing.assert_array_equal, found, together(expected))


def test_exploration_slice_by_slice():
    masks, weights, gradients = draw(np.random.default_rng(5), ties=True)
    keep, total = [6, 2, 4, 1], [11, 5, 4, 30]
    by_array = lambda k: [k[0], jnp.array(k[1:])]
    found = channels.drop_and_grow_together(
        *map(together, (masks, weights, gradients)),
        keep=by_array(keep),
        total=by_array(total),
        axes=[None, (1, 2)],
    )
    alone = lambda tree: [{"": tree["a"]}, *({"": one} for one in tree["b"])]
    slices = zip(*map(alone, (masks, weights, gradients)), keep, total, strict=True)
    expected = [chase_oracles.explore(*drawn)[""] for drawn in slices]
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], np.stack(expected[1:]))


def test_nothing_grows_by_a_zero_or_a_nan():
    masks = [jnp.array([True, False, False, False])]
    gradients = [jnp.array([0.0, 0.0, jnp.nan, -0.0])]
    weights = [jnp.zeros(4)]
    for keep, expected in ((1, [True, False, False, False]), (0, [False] * 4)):
        (found,) = explore(masks, weights, gradients, keep, 4)
        assert found.tolist() == expected


def test_a_weight_that_is_nan_is_dropped_first_and_kept_where_all_are():
    masks, gradients = [jnp.ones(3, bool)], [jnp.zeros(3)]
    weights = [jnp.array([1.0, jnp.nan, -2.0])]
    for keep, expected in ((3, [True] * 3), (2, [True, False, True])):
        (found,) = explore(masks, weights, gradients, keep, 3)
        assert found.tolist() == expected


def test_dtypes_are_compared_with_each_other():
    masks = [jnp.ones(2, bool), jnp.ones(2, bool)]
    weights = [jnp.array([1.0, 2.0], jnp.bfloat16), jnp.array([1.001, 1.5])]
    gradients = [jnp.zeros(2, jnp.bfloat16), jnp.zeros(2)]
    found = explore(masks, weights, gradients, 3, 3)
    assert [one.tolist() for one in found] == [[False, True], [True, True]]
    assert oracles.top_k(np.array([1.0, 2.0, 1.001, 1.5]), 3).tolist() == [0, 1, 1, 1]
