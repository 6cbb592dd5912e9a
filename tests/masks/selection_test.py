import functools
import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from sparsejax.masks import _search, selection

SHAPE = (5, 12)
SIZE = 60
STACK = (3, 4, 5)  # for selections slice by slice

DTYPES = [jnp.dtype(d) for d in (jnp.float32, jnp.bfloat16, jnp.float16)]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
FLOAT32 = DTYPES[0]

counts = st.integers(-2, SIZE + 2)


@pytest.fixture(autouse=True, scope="module")
def strict_promotion_of_any_nan():
    # NumPy complains when it casts a signalling NaN, which any bits may be.
    with jax.numpy_dtype_promotion("strict"), np.errstate(invalid="ignore"):
        yield


def special(dtype):
    """List what a comparison may get wrong, with both signs."""
    info = jnp.finfo(dtype)
    least, normal = info.smallest_subnormal, info.smallest_normal
    values = [0, least, 2 * least, normal, 1, info.max, np.inf, np.nan]
    return np.array([*values, *(-np.array(values, dtype))], dtype)


def scores(dtype, shape=SHAPE):
    """Draw scores: any bits at all, few values with many ties, or a normal sample."""
    values = special(dtype)
    bits = hnp.arrays(f"uint{8 * dtype.itemsize}", shape)
    index = hnp.arrays(np.intp, shape, elements=st.integers(0, len(values) - 1))
    normal = lambda seed: np.random.default_rng(seed).normal(size=shape)
    return (
        bits.map(lambda array: array.view(dtype))
        | index.map(lambda array: values[array])
        | st.integers(0, 2**32 - 1).map(lambda seed: np.array(normal(seed), dtype))
    )


def masks(shape=SHAPE):
    return hnp.arrays(bool, shape)


@functools.cache
def compiled(function, axis=None):
    return jax.jit(functools.partial(function, axis=axis))


def top_k_mask(values, k, *, axis=None, where=None):
    """Select by the compiled function."""
    k = jnp.asarray(k, jnp.int32)
    result = compiled(selection.top_k_mask, axis)(values, k, where=where)
    assert result.dtype == bool and result.shape == np.shape(values)
    return np.asarray(result)


def kth_largest(values, k, *, axis=None, where=None):
    """Return the value by the compiled function."""
    k = jnp.asarray(k, jnp.int32)
    result = compiled(selection.kth_largest, axis)(values, k, where=where)
    assert result.dtype == values.dtype
    return np.asarray(result).astype(np.float64)


def expected_kth(values, k, where):
    """Return the k-th largest of an array, NaN where there is none."""
    eligible = int((where & ~np.isnan(values)).sum())
    return oracles.kth_largest(values, k, where) if 0 < k <= eligible else np.nan


def first(count, shape=SHAPE):
    """Return a mask of the first so many positions."""
    return np.arange(math.prod(shape)).reshape(shape) < count


# Against the oracle


@each_dtype
@hypothesis.given(st.data(), counts)
def test_top_k_mask_equals_the_oracle(dtype, data, k):
    values = data.draw(scores(dtype))
    np.testing.assert_array_equal(top_k_mask(values, k), oracles.top_k(values, k))


@each_dtype
@hypothesis.given(st.data(), masks(), counts)
def test_top_k_mask_chooses_among_what_is_eligible(dtype, data, where, k):
    values = data.draw(scores(dtype))
    result = top_k_mask(values, k, where=where)
    np.testing.assert_array_equal(result, oracles.top_k(values, k, where=where))


@pytest.mark.parametrize(
    ("axis", "slices"),
    [
        (0, (4, 5)),
        (-2, (3, 5)),
        ((1, 2), (3,)),
        ((-1, 0), (4,)),
        ((0, 1, 2), ()),
        ((), STACK),
    ],
)
@hypothesis.given(scores(FLOAT32, STACK), masks(STACK), st.data())
def test_every_slice_has_its_own_count(axis, slices, values, where, data):
    k = data.draw(hnp.arrays(np.int32, slices, elements=st.integers(-2, 20)))
    result = top_k_mask(values, k, axis=axis, where=where)
    expected = oracles.top_k(values, k, axis, where)
    np.testing.assert_array_equal(result, expected)


@hypothesis.given(scores(FLOAT32, STACK), st.integers(-2, 22))
def test_one_count_holds_for_every_slice(values, k):
    result = top_k_mask(values, k, axis=(0, 2))
    np.testing.assert_array_equal(result, oracles.top_k(values, k, (0, 2)))


@each_dtype
@hypothesis.given(st.data(), masks(), counts)
def test_kth_largest_equals_the_oracle(dtype, data, where, k):
    values = data.draw(scores(dtype))
    result = kth_largest(values, k, where=where)
    np.testing.assert_array_equal(result, expected_kth(values, k, where))


@hypothesis.given(
    scores(FLOAT32, STACK),
    masks(STACK),
    hnp.arrays(np.int32, 4, elements=st.integers(0, 16)),
)
def test_kth_largest_equals_the_oracle_in_every_slice(values, where, k):
    result = kth_largest(values, k, axis=(0, 2), where=where)
    expected = [expected_kth(values[:, i], k[i], where[:, i]) for i in range(4)]
    np.testing.assert_array_equal(result, expected)


TREE = {"a": (3, 4), "b": (), "c": (0, 2), "d": (7,)}
global_top_k_mask = jax.jit(selection.global_top_k_mask)


@hypothesis.given(st.data(), st.integers(-1, 21))
def test_leaves_of_a_tree_compete(data, k):
    tree = {name: data.draw(scores(FLOAT32, shape)) for name, shape in TREE.items()}
    where = {name: data.draw(masks(shape)) for name, shape in TREE.items()}
    result = global_top_k_mask(tree, k, where=where)
    for name, expected in oracles.top_k_tree(tree, k, where).items():
        np.testing.assert_array_equal(result[name], expected)


def test_a_tie_goes_to_the_first_leaf_and_there_to_the_lowest_index():
    tree = {"b": jnp.ones(4), "a": jnp.ones(3), "c": [jnp.ones(2), 2 * jnp.ones(())]}
    result = selection.global_top_k_mask(tree, 6)
    assert result["a"].tolist() == [True] * 3
    assert result["b"].tolist() == [True, True, False, False]
    assert [leaf.tolist() for leaf in result["c"]] == [[False, False], True]


SEVERAL = [  # dtype, shape, axis, shape of k
    (DTYPES[0], (5, 12), None, ()),
    (DTYPES[1], (4, 3), 0, (3,)),
    (DTYPES[2], (5, 12), -1, (5,)),
    (DTYPES[0], (), None, ()),
    (DTYPES[1], (2, 3, 5), (0, 2), ()),
]


@jax.jit
def select_several(values, k, where):
    axes = [axis for _, _, axis, _ in SEVERAL]
    return selection.top_k_masks(values, k, axis=axes, where=[None, *where])


@hypothesis.given(st.data())
def test_arrays_selected_together_are_those_selected_alone(data):
    values = [data.draw(scores(dtype, shape)) for dtype, shape, _, _ in SEVERAL]
    where = [None, *(data.draw(masks(shape)) for _, shape, _, _ in SEVERAL[1:])]
    elements = st.integers(-1, 12)
    k = [data.draw(hnp.arrays(np.int32, s, elements=elements)) for *_, s in SEVERAL]
    together = select_several(values, k, where[1:])
    axes = [axis for _, _, axis, _ in SEVERAL]
    for one, *arguments in zip(together, values, k, axes, where, strict=True):
        np.testing.assert_array_equal(one, oracles.top_k(*arguments))


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((), None),
        ((), ()),
        ((1,), None),
        ((1, 1), 0),
        ((2, 17), None),
        ((17, 1), 1),
    ],
    ids=str,
)
def test_arrays_of_any_shape(shape, axis):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for k in (-1, 0, 1, 40):
        expected = oracles.top_k(values, k, axis)
        np.testing.assert_array_equal(top_k_mask(values, k, axis=axis), expected)


@pytest.mark.parametrize(
    ("shape", "axis", "slices"),
    [
        ((0,), None, ()),
        ((0,), 0, ()),
        ((3, 0), None, ()),
        ((3, 0), 1, (3,)),
        ((3, 0), 0, (0,)),
    ],
    ids=str,
)
def test_empty_arrays(shape, axis, slices):
    values = np.zeros(shape, np.float32)
    assert top_k_mask(values, 2, axis=axis).size == 0
    largest = kth_largest(values, np.full(slices, 1), axis=axis)
    assert largest.shape == slices and np.isnan(largest).all()


def test_where_there_is_no_value_the_nan_is_a_quiet_one():
    values, quiet = np.ones(SHAPE, np.float32), np.uint32(1 << 22)
    for k in (0, SIZE + 1):
        result = compiled(selection.kth_largest)(values, k, where=None)
        assert np.isnan(result)
        assert np.asarray(result).view(np.uint32) & quiet


# The values that a comparison may get wrong


@each_dtype
@pytest.mark.parametrize("value", [0, 1, -1, -np.inf, np.inf])
def test_among_equal_scores_the_first_are_chosen(dtype, value):
    values = np.full(SHAPE, value, dtype)
    for k in (0, 1, 17, SIZE - 1, SIZE):
        np.testing.assert_array_equal(top_k_mask(values, k), first(k))


@pytest.mark.parametrize("k", [3, 4, 5, 31, SIZE])
def test_among_scores_that_are_mostly_zero_the_first_zeros_fill_up(k):
    values = np.zeros(SHAPE, np.float32)
    values.flat[[58, 7, 30, 31]] = [0.5, 2, 1, -1]
    chosen = np.flatnonzero(top_k_mask(values, k))
    order = [7, 30, 58, *(i for i in range(SIZE) if i not in (7, 30, 31, 58)), 31]
    assert chosen.tolist() == sorted(order[:k])


@each_dtype
def test_zeros_of_both_signs_are_equal(dtype):
    values = np.array(np.where(np.arange(SIZE) % 2 == 0, -0.0, 0.0), dtype)
    values = values.reshape(SHAPE)
    assert np.signbit(values).sum() == SIZE // 2
    np.testing.assert_array_equal(top_k_mask(values, 3), first(3))


@each_dtype
def test_denormals_are_ordered(dtype):
    rank = np.random.default_rng(0).permutation(SIZE).astype(f"u{dtype.itemsize}")
    values = rank.view(dtype).reshape(SHAPE)
    assert 0 < values.max() < jnp.finfo(dtype).smallest_normal
    for k in (1, 20, SIZE - 1):
        expected = (rank >= SIZE - k).reshape(SHAPE)
        np.testing.assert_array_equal(top_k_mask(values, k), expected)
        np.testing.assert_array_equal(top_k_mask(-values, k), (rank < k).reshape(SHAPE))
        assert kth_largest(values, k) == values.flat[np.argmax(rank == SIZE - k)]


@each_dtype
def test_infinities_are_scores_and_undefined_ones_are_not(dtype):
    values = np.full(SHAPE, np.nan, dtype)
    values.flat[[3, 10, 20, 40]] = [-np.inf, 1, np.inf, -jnp.finfo(dtype).max]
    values.flat[50] = -values.flat[0]  # NaN with the other sign
    order = [20, 10, 40, 3]
    for k in range(7):
        chosen = np.flatnonzero(top_k_mask(values, k)).tolist()
        assert chosen == sorted(order[:k])
    assert [kth_largest(values, k) for k in (1, 4)] == [np.inf, -np.inf]
    assert np.isnan(kth_largest(values, 5))


@pytest.mark.parametrize("where", [None, np.arange(SIZE).reshape(SHAPE) % 3 == 0])
def test_nothing_is_chosen_where_nothing_is_eligible(where):
    values = np.where(where, np.nan, 1) if where is not None else np.full(SHAPE, np.nan)
    assert not top_k_mask(values.astype(np.float32), SIZE, where=where).any()


# Large arrays


def test_a_large_array_against_a_partition():
    values = np.random.default_rng(0).normal(size=(641, 503)).astype(np.float32)
    assert len(np.unique(values)) < values.size
    for k in (1, 1000, values.size // 2, values.size - 1):
        threshold = np.partition(values, values.size - k, axis=None)[-k]
        mask = top_k_mask(values, k)
        assert kth_largest(values, k) == threshold
        assert mask.sum() == k
        assert mask[values > threshold].all() and not mask[values < threshold].any()


def test_counts_are_exact_where_float32_cannot_count():
    size = 2**24 + 3
    zeros = [5, size - 1]
    values = jnp.ones(size, jnp.float16).at[jnp.array(zeros)].set(0)
    for k, left_out in [
        (2**24 + 1, zeros),
        (2**24, [*zeros, size - 2]),
        (2**24 + 2, [size - 1]),
    ]:
        mask = top_k_mask(values, k)
        assert np.flatnonzero(~mask).tolist() == sorted(left_out)
    assert kth_largest(values, 2**24 + 1) == 1
    assert kth_largest(values, 2**24 + 2) == 0


# Compilation


@pytest.mark.parametrize(
    "k", [3, np.int64(3), np.uint8(3), jnp.int32(3)], ids=lambda k: type(k).__name__
)
def test_eager_equals_compiled(k):
    values = np.random.default_rng(0).normal(size=SHAPE).round(1).astype(np.float32)
    eager = selection.top_k_mask(values, k)
    np.testing.assert_array_equal(eager, top_k_mask(values, k))
    assert float(selection.kth_largest(values, k)) == kth_largest(values, k)
    assert eager.sum() == 3


def test_one_compilation_serves_every_count():
    traces = []

    @jax.jit
    def select(values, k):
        traces.append(k)
        return selection.top_k_mask(values, k)

    values = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    numbers = [int(select(values, k).sum()) for k in (0, 1, 17, SIZE, SIZE + 9, -3)]
    assert numbers == [0, 1, 17, SIZE, SIZE, 0]
    assert len(traces) == 1


def test_a_batch_of_arrays_and_counts():
    values = np.random.default_rng(2).normal(size=(6, *SHAPE)).round(1)
    values = values.astype(np.float32)
    k = np.array([0, 1, 7, 30, 60, 61], np.int32)
    both = jax.jit(jax.vmap(selection.top_k_mask))(values, k)
    only_k = jax.jit(jax.vmap(selection.top_k_mask, (None, 0)))(values[0], k)
    value = jax.jit(jax.vmap(selection.kth_largest, (0, None)))(values, 7)
    for i in range(6):
        np.testing.assert_array_equal(both[i], oracles.top_k(values[i], k[i]))
        np.testing.assert_array_equal(only_k[i], oracles.top_k(values[0], k[i]))
        assert value[i] == oracles.kth_largest(values[i], 7)


# Bad input

ONES = np.ones(SHAPE, np.float32)


@pytest.mark.parametrize("select", [selection.top_k_mask, selection.kth_largest])
@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (
            TypeError,
            "float32, bfloat16 or float16, got int32",
            {"scores": np.arange(3)},
        ),
        (TypeError, "float32, bfloat16 or float16, got bool", {"scores": ONES > 0}),
        (TypeError, "k must be an integer, got dtype float32", {"k": 3.0}),
        (TypeError, "k must be an integer, got dtype bool", {"k": True}),
        (
            ValueError,
            r"k must be a scalar.*shape \(\), got shape \(5,\)",
            {"k": [1] * 5},
        ),
        (
            ValueError,
            r"k must be a scalar or hold one value per slice, shape \(12,\), "
            r"got shape \(5,\)",
            {"k": [1] * 5, "axis": 0},
        ),
        (
            ValueError,
            r"where= must have the shape of the scores, \(5, 12\), got \(12,\)",
            {"where": np.ones(12, bool)},
        ),
        (ValueError, "axis 2 is out of bounds for array of dimension 2", {"axis": 2}),
        (ValueError, "repeated axis", {"axis": (1, -1)}),
    ],
)
def test_arguments_that_do_not_fit_are_refused(select, error, message, arguments):
    given = {"scores": ONES, "k": 3, **arguments}
    with pytest.raises(error, match=message):
        select(given.pop("scores"), np.asarray(given.pop("k")), **given)


@pytest.mark.parametrize(
    ("error", "message", "tree", "k"),
    [
        (ValueError, "the tree has no leaves", {"a": None}, 1),
        (ValueError, r"k must be a scalar.*got shape \(2,\)", {"a": ONES}, [1, 2]),
        (TypeError, "k must be an integer, got dtype float32", {"a": ONES}, 0.5),
        (TypeError, "float16, got int32", {"a": np.arange(3)}, 1),
        (
            TypeError,
            "must have one dtype, got float16, float32; cast them",
            {"a": ONES, "b": ONES.astype(np.float16)},
            1,
        ),
    ],
)
def test_trees_that_do_not_fit_are_refused(error, message, tree, k):
    with pytest.raises(error, match=message):
        selection.global_top_k_mask(tree, jnp.asarray(k))


def test_a_tree_of_eligible_positions_must_be_like_the_scores():
    with pytest.raises(ValueError, match="where= must have the shape"):
        selection.global_top_k_mask({"a": ONES}, 3, where={"a": ONES[0] > 0})
    with pytest.raises(ValueError, match="b"):
        selection.global_top_k_mask({"a": ONES}, 3, where={"b": ONES > 0})


def test_more_scores_than_int32_counts_are_refused():
    vector = lambda size: jax.ShapeDtypeStruct((size,), jnp.float16)
    together = lambda *leaves: selection.global_top_k_mask(leaves, 3)
    alone = lambda scores: selection.top_k_mask(scores, 3)
    most = 2**31 - 1
    assert jax.eval_shape(alone, vector(most)).shape == (most,)
    assert len(jax.eval_shape(together, vector(2**30), vector(2**30 - 1))) == 2
    with pytest.raises(ValueError, match="fewer than 2.*31 scores, got 2147483648"):
        jax.eval_shape(alone, vector(2**31))
    with pytest.raises(ValueError, match="fewer than 2.*31 scores, got 2147483648"):
        jax.eval_shape(together, vector(2**30), vector(2**30))


# The search


@hypothesis.given(keys=st.lists(st.integers(0, 6), min_size=1, max_size=8))
def test_a_search_for_more_than_there_are_finds_none_above(keys):
    array = np.array(keys, np.uint32)
    count = lambda tries: [jnp.sum(array >= t, dtype=jnp.int32)[None] for t in tries]
    found = _search.search(count, jnp.array([9]), jnp.array([7], jnp.uint32))
    assert found.threshold == 0 and found.above == np.count_nonzero(array)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((3, 3, 37, 5), (0, 1, 2)), ((64, 7), (0,)), ((2, 34, 6), (1,)), ((5, 4), (1,))],
)
def test_counts_of_slices(shape, axes):
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 9, shape).astype(np.uint32)
    wide = tuple(1 if i in axes else n for i, n in enumerate(shape))
    cuts = [rng.integers(0, 9, wide).astype(np.uint32) for _ in range(3)]
    counts = _search.count_reached(jnp.asarray(keys), [*map(jnp.asarray, cuts)], axes)
    for cut, found in zip(cuts, counts, strict=True):
        np.testing.assert_array_equal(found, (keys >= cut).sum(axis=axes))
