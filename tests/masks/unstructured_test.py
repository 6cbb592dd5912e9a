import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from sparsejax.masks import unstructured

SHAPE = (5, 12)
SIZE = 60
STACK = (3, 4, 5)  # for updates slice by slice

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)

# Many ties, and the values that a comparison may get wrong.
SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0, np.inf, np.nan, 1e-40, 1e-7, 6e4]


def scores(shape=SHAPE, extra=()):
    """Draw scores: few values with many ties, or many with the special ones among."""
    special = [*SPECIAL, *extra]
    elements = st.sampled_from(special) | st.floats(-9, 9, width=16)

    def mixed(seed):
        rng = np.random.default_rng(seed)
        values = rng.normal(size=shape)
        return np.where(rng.random(shape) < 0.2, rng.choice(special, shape), values)

    return hnp.arrays(np.float32, shape, elements=elements) | st.integers(
        0, 2**32 - 1
    ).map(lambda seed: mixed(seed).astype(np.float32))


def distinct_scores():
    """Draw scores that differ, in bits that only float32 has."""
    return st.randoms(use_true_random=False).map(
        lambda r: 1 + np.float32(np.reshape(r.sample(range(1000), SIZE), SHAPE)) / 2**20
    )


def masks(shape=SHAPE):
    return hnp.arrays(bool, shape)


@pytest.fixture(autouse=True, scope="module")
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@functools.cache
def compiled(function, axis=None):
    return jax.jit(functools.partial(function, axis=axis))


one_by_one = jax.jit(jax.vmap(unstructured.drop_and_grow, in_axes=(0, 0, 0, None)))


def drop_and_grow(mask, drop, grow, n_drop, *, axis=None, dtype=jnp.float32):
    """Update a mask by the compiled function; also give the scores as it saw them."""
    drop, grow = jnp.asarray(drop, dtype), jnp.asarray(grow, dtype)
    update = compiled(unstructured.drop_and_grow, axis)
    result = update(mask, drop, grow, jnp.asarray(n_drop, jnp.int32))
    assert result.dtype == bool and result.shape == mask.shape
    return np.asarray(result), as_ranked(mask, drop), as_ranked(mask, grow)


def as_ranked(mask, values):
    """Return magnitudes, and 0 for what is undefined at an active weight."""
    values = np.abs(np.asarray(values).astype(np.float32))
    return np.where(mask & np.isnan(values), 0, values)


def prune(mask, score, k, *, axis=None, dtype=jnp.float32):
    """Prune a mask by the compiled function; also give the scores as it saw them."""
    score = jnp.asarray(score, dtype)
    update = compiled(unstructured.prune, axis)
    result = update(mask, score, jnp.asarray(k, jnp.int32))
    assert result.dtype == bool and result.shape == mask.shape
    return np.asarray(result), as_ranked(mask, score)


@each_dtype
@hypothesis.given(masks(), scores(extra=[-np.inf]), scores(), st.integers(-2, SIZE + 2))
def test_drop_and_grow_equals_the_oracle(dtype, mask, drop, grow, n_drop):
    result, drop, grow = drop_and_grow(mask, drop, grow, n_drop, dtype=dtype)
    expected = oracles.drop_and_grow(mask, drop, grow, n_drop)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    ("axis", "slices"), [((1, 2), (3,)), (0, (4, 5)), (-1, (3, 4))]
)
@hypothesis.given(masks(STACK), scores(STACK), scores(STACK), st.data())
def test_drop_and_grow_equals_the_oracle_in_every_slice(
    axis, slices, mask, drop, grow, data
):
    n_drop = data.draw(hnp.arrays(np.int32, slices, elements=st.integers(0, 20)))
    result, drop, grow = drop_and_grow(mask, drop, grow, n_drop, axis=axis)
    expected = oracles.drop_and_grow(mask, drop, grow, n_drop, axis)
    np.testing.assert_array_equal(result, expected)


@hypothesis.given(masks(STACK), scores(STACK), scores(STACK), st.integers(0, 20))
def test_slices_of_a_stack_are_layers_of_their_own(mask, drop, grow, n_drop):
    result, _, _ = drop_and_grow(mask, drop, grow, np.full(3, n_drop), axis=(1, 2))
    np.testing.assert_array_equal(result, one_by_one(mask, drop, grow, n_drop))


@hypothesis.given(
    masks(),
    scores(extra=[-np.inf]),
    scores(extra=[-np.inf]),
    st.integers(-2, SIZE + 2),
)
def test_the_number_of_active_weights_never_changes(mask, drop, grow, n_drop):
    result, _, _ = drop_and_grow(mask, drop, grow, n_drop)
    assert result.sum() == mask.sum()


@hypothesis.given(masks(), distinct_scores(), distinct_scores(), st.data())
def test_the_strongest_stay_and_the_steepest_grow(mask, drop, grow, data):
    active = int(mask.sum())
    n_drop = data.draw(st.integers(0, active))
    result, _, _ = drop_and_grow(mask, drop, grow, n_drop)
    weakest_first = sorted(np.flatnonzero(mask), key=lambda i: drop.flat[i])
    kept = set(weakest_first[n_drop:])
    chosen = set(np.flatnonzero(result))
    assert kept <= chosen
    grown, passed_over = chosen - kept, set(range(SIZE)) - chosen
    assert len(grown) == n_drop
    if grown and passed_over:
        least_grown = min(grow.flat[i] for i in grown)
        assert least_grown > max(grow.flat[i] for i in passed_over)


@hypothesis.given(masks(), scores(), scores())
def test_nothing_changes_when_nothing_is_dropped(mask, drop, grow):
    result, _, _ = drop_and_grow(mask, drop, grow, 0)
    np.testing.assert_array_equal(result, mask)


@hypothesis.given(masks(), scores(), scores().map(np.nan_to_num))
def test_growth_alone_decides_when_everything_is_dropped(mask, drop, grow):
    active = int(mask.sum())
    result, _, grow = drop_and_grow(mask, drop, grow, active)
    np.testing.assert_array_equal(result, oracles.top_k(grow, active))


@hypothesis.given(masks(), scores(), st.integers(0, SIZE))
def test_undefined_gradients_grow_nothing(mask, drop, n_drop):
    grow = np.full(SHAPE, np.nan, np.float32)
    result, _, _ = drop_and_grow(mask, drop, grow, n_drop)
    np.testing.assert_array_equal(result, mask)


@hypothesis.given(masks(), distinct_scores(), scores(), st.integers(0, SIZE))
def test_an_inactive_weight_with_an_undefined_gradient_never_grows(
    mask, drop, grow, n_drop
):
    result, _, grow = drop_and_grow(mask, drop, grow, n_drop)
    assert not (result & ~mask & np.isnan(grow)).any()


def test_ties_go_to_the_lowest_index():
    mask = np.array([False, True, True, False, True, True])
    same = np.ones(6, np.float32)
    # 5 and 4 are dropped: 1 and 2 stay. 0 and 3 grow: the first that are not kept.
    result, _, _ = drop_and_grow(mask, same, same, 2)
    assert np.flatnonzero(result).tolist() == [0, 1, 2, 3]


def test_an_active_weight_of_zero_is_not_taken_for_an_inactive_one():
    mask = np.array([False, False, True, True])
    weight = np.array([0.0, 0.0, 0.0, -0.0], np.float32)
    gradient = np.array([1.0, 2.0, 0.0, 0.0], np.float32)
    result, _, _ = drop_and_grow(mask, weight, gradient, 1)
    assert np.flatnonzero(result).tolist() == [1, 2]


def test_a_dropped_weight_may_grow_again():
    mask = np.array([True, True, False])
    weight = np.array([0.1, 3.0, 0.0], np.float32)
    gradient = np.array([9.0, 0.0, 1.0], np.float32)
    result, _, _ = drop_and_grow(mask, weight, gradient, 1)
    assert np.flatnonzero(result).tolist() == [0, 1]


@pytest.mark.parametrize(
    "n_drop", [3, np.int32(3), jnp.int32(3)], ids=["int", "numpy", "jax"]
)
def test_eager_equals_compiled(n_drop):
    rng = np.random.default_rng(0)
    mask = rng.random(SHAPE) < 0.4
    drop, grow = (jnp.asarray(rng.random(SHAPE), jnp.float32) for _ in range(2))
    eager = unstructured.drop_and_grow(jnp.asarray(mask), drop, grow, n_drop)
    result, _, _ = drop_and_grow(mask, drop, grow, n_drop)
    np.testing.assert_array_equal(result, eager)
    assert (result != mask).any()


def test_one_compilation_serves_every_number_of_drops():
    traces = []

    @jax.jit
    def update(mask, drop, grow, n_drop):
        traces.append(n_drop)
        return unstructured.drop_and_grow(mask, drop, grow, n_drop)

    rng = np.random.default_rng(1)
    mask = rng.random(SHAPE) < 0.5
    drop, grow = (rng.random(SHAPE, np.float32) for _ in range(2))
    changed = [int((update(mask, drop, grow, n) != mask).sum()) for n in (0, 1, 9, 20)]
    assert len(traces) == 1
    assert changed[0] == 0 and len(set(changed)) > 2


@hypothesis.given(
    masks(),
    distinct_scores(),
    distinct_scores(),
    st.integers(0, SIZE),
    st.permutations(range(5)),
)
def test_permuting_neurons_permutes_the_mask(mask, drop, grow, n_drop, order):
    result, _, _ = drop_and_grow(mask, drop, grow, n_drop)
    permuted, _, _ = drop_and_grow(mask[order], drop[order], grow[order], n_drop)
    np.testing.assert_array_equal(permuted, result[order])


@each_dtype
@hypothesis.given(masks(), scores(), st.integers(-2, SIZE + 2))
def test_prune_equals_the_oracle(dtype, mask, score, k):
    result, score = prune(mask, score, k, dtype=dtype)
    np.testing.assert_array_equal(result, oracles.prune(mask, score, k))


@hypothesis.given(
    masks(STACK), scores(STACK), hnp.arrays(np.int32, 3, elements=st.integers(0, 20))
)
def test_prune_equals_the_oracle_in_every_slice(mask, score, k):
    result, score = prune(mask, score, k, axis=(1, 2))
    np.testing.assert_array_equal(result, oracles.prune(mask, score, k, (1, 2)))


@hypothesis.given(masks(), scores(extra=[-np.inf]), st.integers(0, SIZE))
def test_prune_keeps_exactly_k_and_revives_nothing(mask, score, k):
    result, _ = prune(mask, score, k)
    assert result.sum() == min(k, mask.sum())
    assert not (result & ~mask).any()


@hypothesis.given(
    scores().map(np.nan_to_num), st.integers(0, SIZE), st.integers(0, SIZE)
)
def test_pruning_in_two_goes_is_pruning_in_one(score, one, other):
    fewer, more = sorted((one, other))
    dense = np.ones(SHAPE, bool)
    at_once, _ = prune(dense, score, fewer)
    first, _ = prune(dense, score, more)
    np.testing.assert_array_equal(prune(first, score, fewer)[0], at_once)
    assert not (at_once & ~first).any()


def test_prune_takes_an_undefined_weight_for_zero():
    weight = np.array([np.nan, 0.1, np.nan, -1.0], np.float32)
    dense = np.ones(4, bool)
    assert np.flatnonzero(prune(dense, weight, 2)[0]).tolist() == [1, 3]
    assert np.flatnonzero(prune(dense, weight, 3)[0]).tolist() == [0, 1, 3]


def test_rank_is_by_magnitude():
    mask = np.array([True, True, True, False, False])
    weight = np.array([-3.0, 1.0, 2.0, 0.0, 0.0], np.float32)
    gradient = np.array([0.0, 0.0, 0.0, -2.0, 1.0], np.float32)
    result, _, _ = drop_and_grow(mask, weight, gradient, 1)
    assert np.flatnonzero(result).tolist() == [0, 2, 3]
    assert np.flatnonzero(prune(mask, weight, 1)[0]).tolist() == [0]


def test_masks_updated_together_are_those_updated_alone():
    rng = np.random.default_rng(2)
    shapes = [(5, 12), (3, 4, 5), (7,)]
    axes = [None, (1, 2), None]
    masks = [rng.random(shape) < 0.5 for shape in shapes]
    weights = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    grows = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    active = [m.sum(axis=a) for m, a in zip(masks, axes, strict=True)]
    n_drop = [a // 2 for a in active]
    together = jax.jit(
        lambda *lists: unstructured.drop_and_grow_all(
            *lists, active=active, n_drop=n_drop, axes=axes
        )
    )(masks, weights, grows)
    pruned = unstructured.prune_all(masks, weights, k=n_drop, axes=axes)
    for i, (mask, weight, grow) in enumerate(zip(masks, weights, grows, strict=True)):
        alone, _, _ = drop_and_grow(mask, weight, grow, n_drop[i], axis=axes[i])
        np.testing.assert_array_equal(together[i], alone)
        fewer, _ = prune(mask, weight, n_drop[i], axis=axes[i])
        np.testing.assert_array_equal(pruned[i], fewer)


def test_weights_of_all_arrays_compete_when_pruned_together():
    rng = np.random.default_rng(3)
    masks = {"a": rng.random((4, 5)) < 0.7, "b": rng.random(9) < 0.7}
    weights = {name: rng.normal(size=m.shape).round(1) for name, m in masks.items()}
    arrays = [jnp.asarray(w, jnp.float32) for w in weights.values()]
    kept = unstructured.prune_together([*masks.values()], arrays, 8)
    expected = oracles.prune_tree(masks, {n: np.abs(w) for n, w in weights.items()}, 8)
    for name, mask in zip(masks, kept, strict=True):
        np.testing.assert_array_equal(mask, expected[name])
