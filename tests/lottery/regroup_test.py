"""Blocks of rows and columns in unstructured masks."""

import functools
import sys

import jax.numpy as jnp
import lottery_oracles as oracles
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax import lottery, masks, sparse_optax
from sparsejax.lottery import _partition

MODES = ("exact", "stale", "count")


def at_once(incidence, groups, seed):
    """Put all rows into one group."""
    return np.zeros(len(incidence), int)


def by_first_column(incidence, groups, seed):
    """Know planted blocks, in which rows with the same first column belong together."""
    _, parts = np.unique(incidence.argmax(1), return_inverse=True)
    return parts


def by_count(incidence, groups, seed):
    """Group rows by their number of weights, whatever their order."""
    return incidence.sum(1) % groups


def planted(m, clusters=8, rows=32, seed=0):
    """Return a shuffled mask [n, out] of dense blocks, and each row's and column's."""
    rng = np.random.default_rng(seed)
    matrix = np.kron(np.eye(clusters, dtype=bool), np.ones((rows, m), bool))
    by_row, by_column = (rng.permutation(n) for n in matrix.shape)
    return matrix[by_row][:, by_column].T, by_row // rows, by_column // m


def check_structure(given, found):
    """Check what holds of every result."""
    assert found.fallback == (not found.blocks) == bool(found.reason)
    assert found.mask.shape == given.shape and found.mask.dtype == bool
    if found.fallback:
        np.testing.assert_array_equal(found.mask, given)
        return
    union, covered = np.zeros((given.shape[-1], given[..., 0].size), bool), []
    for rows, columns in found.blocks:
        assert rows.dtype == columns.dtype == np.int32
        assert (np.diff(rows) > 0).all() and (np.diff(columns) > 0).all()
        union[np.ix_(rows, columns)] = True
        covered.extend(rows)
        assert len(set(found.assignment[rows])) == 1
    assert len(set(covered)) == len(covered)
    assert union.sum() == sum(len(rows) * len(cols) for rows, cols in found.blocks)
    np.testing.assert_array_equal(found.mask.reshape(-1, given.shape[-1]).T, union)


@pytest.mark.parametrize(
    ("mode", "fewest", "most"),
    [("exact", 121, 121), ("stale", 301, 302), ("count", 200, 200)],
)
def test_planted_blocks_are_found(mode, fewest, most):
    mask, by_row, by_column = planted(200)
    found = lottery.regroup(mask, mode=mode, partitioner=by_first_column)
    check_structure(mask, found)
    assert len(found.blocks) == 8
    for rows, columns in found.blocks:
        (own,) = set(by_row[rows])
        np.testing.assert_array_equal(rows, np.flatnonzero(by_row == own))
        assert fewest <= len(columns) <= most
        inside = by_column[columns] == own
        assert inside.all() if mode != "stale" else inside.sum() == 200
    if mode == "count":
        np.testing.assert_array_equal(found.mask, mask)


@pytest.mark.parametrize("mode", MODES)
def test_partitioner_finds_planted_blocks(mode):
    pytest.importorskip("mtkahypar")
    mask, by_row, _ = planted(20)
    found = lottery.regroup(mask, mode=mode, seed=3)
    assert {tuple(rows) for rows, _ in found.blocks} == {
        tuple(np.flatnonzero(by_row == own)) for own in range(8)
    }
    again = lottery.regroup(mask, mode=mode, seed=3)
    np.testing.assert_array_equal(again.mask, found.mask)
    np.testing.assert_array_equal(again.assignment, found.assignment)
    assert found.seed == 3


def test_partitioner_balances_and_cuts_less_than_chance():
    pytest.importorskip("mtkahypar")
    rng = np.random.default_rng(0)
    own = rng.permutation(np.repeat(np.arange(8), 32))
    incidence = (rng.random((256, 160)) < 0.6) & (own[:, None] == np.arange(160) // 20)
    incidence |= rng.random(incidence.shape) < 0.02

    def spread(parts):
        counts = [incidence[parts == part].any(0) for part in range(8)]
        return np.sum(counts)

    found = lottery.partition_by_cut(incidence, 8, 0, imbalance=0.1)
    chance = lottery.partition_at_random(incidence, 8, 0)
    assert found.shape == (256,) and np.bincount(found).max() <= 36  # 1.1 * 32, up
    assert spread(found) < 0.8 * spread(chance)


# Measured on the authors' rules: K / n of one group, and the share of the weights
# that are in its block, for masks of 32 x 2304 and 64 x 4608.
BEHAVIOUR = {
    0.1: ((0.11, 0.14), (0.16, 0.17), (0.22, 0.35), (0.27, 0.46)),
    0.2: ((0.18, 0.23), (0.32, 0.33), (0.30, 0.45), (0.40, 0.65)),
    0.4: ((0.27, 0.37), (0.59, 0.63), (0.43, 0.56), (0.68, 0.87)),
    0.6: ((0.34, 0.47), (0.79, 0.93), (0.50, 0.60), (0.94, 0.96)),
}


@pytest.mark.parametrize("density", BEHAVIOUR)
@pytest.mark.parametrize("shape", [(32, 2304), (64, 4608)])
def test_size_of_blocks_in_random_masks(density, shape):
    rng = np.random.default_rng(0)
    mask = (rng.random(shape) < density).T
    exact, stale, inside_exact, inside_stale = BEHAVIOUR[density]
    for mode, size, inside in (
        ("exact", exact, inside_exact),
        ("stale", stale, inside_stale),
    ):
        found = lottery.regroup(mask, mode=mode, partitioner=at_once)
        ((_, columns),) = found.blocks
        kept = (found.mask & mask).sum() / mask.sum()
        assert size[0] - 0.01 <= len(columns) / shape[1] <= size[1] + 0.01
        assert inside[0] - 0.01 <= kept <= inside[1] + 0.01


def test_stale_rule_finds_nothing_in_dense_rows():
    mask = (np.random.default_rng(0).random((32, 2304)) < 0.72).T
    found = lottery.regroup(mask, mode="stale", partitioner=at_once)
    check_structure(mask, found)
    assert found.fallback and "stale" in found.reason
    exact = lottery.regroup(mask, mode="exact", partitioner=at_once)
    assert abs(len(exact.blocks[0][1]) / 2304 - 0.5) < 0.02


@st.composite
def matrices(draw):
    """Draw a mask [out, n] without empty rows and columns."""
    rows, columns = draw(st.integers(4, 24)), draw(st.integers(3, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    matrix = rng.random((rows, columns)) < draw(st.sampled_from([0.1, 0.3, 0.6, 0.9]))
    matrix[:, 0] = matrix[0] = True
    return matrix


@given(matrices(), st.sampled_from(MODES), st.sampled_from([0.7, 1.0, 1.5]))
def test_regroup_is_that_of_the_oracle(matrix, mode, ratio):
    rules = {
        "exact": functools.partial(oracles.exact, ratio=ratio),
        "stale": functools.partial(oracles.stale, ratio=ratio),
        "count": lambda weights: oracles.count(weights, 0.5 * len(weights)),
    }
    found = lottery.regroup(
        matrix.T, groups=3, mode=mode, ratio=ratio, min_rows=2, partitioner=by_count
    )
    check_structure(matrix.T, found)
    partition = lambda rows: by_count(rows, 3, 0)
    expected, blocks = oracles.regrouped(
        matrix, partition, rules[mode], 2, repeat=mode == "count"
    )
    assert found.fallback == (not blocks)
    assert {tuple(rows): tuple(cols) for rows, cols in found.blocks} == blocks
    if blocks:
        np.testing.assert_array_equal(found.mask.T, expected)


def test_rows_without_a_block_are_partitioned_again_by_count_alone():
    matrix = np.zeros((12, 40), bool)
    matrix[:6, :20] = True  # more rows than the others, which come to one group
    matrix[6:9, 20:30] = matrix[9:, 30:] = True
    asked = []

    def partition(incidence, groups, seed):
        asked.append(incidence.shape)
        return np.arange(len(incidence)) // 6

    run = functools.partial(
        lottery.regroup, matrix.T, groups=2, min_rows=3, partitioner=partition
    )
    found = run(mode="count", column_density=0.6)
    assert asked == [(12, 40), (6, 20)] and len(found.blocks) == 1
    assert found.assignment.tolist() == [0] * 6 + [2] * 6  # of the last partition

    halves = lambda incidence, groups, seed: (
        np.arange(len(incidence)) // (len(incidence) // 2)
    )
    found = run(mode="count", column_density=0.6, partitioner=halves)
    check_structure(matrix.T, found)
    np.testing.assert_array_equal(found.mask.T, matrix)
    assert found.assignment.tolist() == [0] * 6 + [2] * 3 + [3] * 3
    once = run(mode="exact", ratio=1, partitioner=halves)
    assert set(once.assignment.tolist()) == {0, 1}


@given(matrices(), st.integers(0, 99))
def test_order_of_rows_does_not_matter(matrix, seed):
    order = np.random.default_rng(seed).permutation(len(matrix))
    for mode in ("exact", "count"):
        run = lambda rows, mode=mode: lottery.regroup(
            rows.T, groups=3, mode=mode, min_rows=2, partitioner=by_count
        )
        straight, shuffled = run(matrix), run(matrix[order])
        np.testing.assert_array_equal(straight.mask.T[order], shuffled.mask.T)


def test_columns_are_those_of_the_reshaped_kernel():
    kh, kw, n, out = 2, 3, 5, 40
    kernel = np.arange(kh * kw * n * out).reshape(kh, kw, n, out)
    mask = np.random.default_rng(1).random(kernel.shape) < 0.4
    mask[..., 7] = False  # a row that no group has
    found = lottery.regroup(
        mask, groups=2, partitioner=lottery.partition_at_random, seed=5
    )
    check_structure(mask, found)
    assert found.assignment[7] == -1 and (found.assignment[:7] >= 0).all()
    rows, columns = found.blocks[0]
    tap, channel = np.divmod(columns, n)
    r, s = np.divmod(tap, kw)
    values = kernel[r[None, :], s[None, :], channel[None, :], rows[:, None]]
    np.testing.assert_array_equal(
        values, kernel.reshape(-1, out).T[np.ix_(rows, columns)]
    )
    # The authors count columns of [out, in, kh, kw].
    theirs = (channel * kh + r) * kw + s
    as_theirs = kernel.transpose(3, 2, 0, 1).reshape(out, -1)
    np.testing.assert_array_equal(as_theirs[np.ix_(rows, theirs)], values)


def test_assignment_gives_the_same_blocks_again():
    mask = np.random.default_rng(2).random((30, 64)) < 0.4
    mask[:, 11] = False
    random = lottery.partition_at_random
    found = lottery.regroup(mask, groups=3, partitioner=random, seed=9)
    stored = found.assignment[found.assignment >= 0]
    again = lottery.regroup(mask, groups=3, partitioner=lambda *_: stored)
    np.testing.assert_array_equal(again.mask, found.mask)
    other = lottery.regroup(mask, groups=3, partitioner=random, seed=10)
    assert (other.assignment != found.assignment).any()


def test_largest_group_comes_first_and_small_ones_go():
    mask = np.ones((10, 60), bool)
    parts = np.repeat([0, 1, 2], [17, 27, 16])
    found = lottery.regroup(mask, groups=3, partitioner=lambda *_: parts)
    assert [len(rows) for rows, _ in found.blocks] == [27, 17]
    assert not found.mask[:, 44:].any() and not found.fallback
    found = lottery.regroup(mask, groups=3, mode="count", partitioner=lambda *_: parts)
    assert [len(rows) for rows, _ in found.blocks] == [27, 17, 16]


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (np.zeros((9, 64), bool), "0 rows are not empty"),
        (np.ones((9, 16), bool), "16 rows are not empty"),
        (np.ones((9, 1), bool), "1 rows are not empty"),
        (np.ones((9, 64), bool), "the largest group has 8 rows"),
        (np.ones((3, 3, 1, 256), bool), "one input channel"),
    ],
    ids=["all zero", "few rows", "one row", "64 rows", "depthwise"],
)
def test_fallback_is_flagged(mask, reason):
    found = lottery.regroup(mask, partitioner=lottery.partition_at_random)
    check_structure(mask, found)
    assert found.fallback and reason in found.reason


def test_all_dense_mask_has_blocks_but_for_the_stale_rule():
    mask = np.ones((100, 256), bool)
    run = functools.partial(lottery.regroup, mask, partitioner=at_once)
    assert len(run(mode="exact").blocks[0][1]) == 61
    assert run(mode="count").mask.all() and not run(mode="count").fallback
    assert run(mode="stale").fallback


def test_too_few_columns_are_no_block():
    mask, *_ = planted(20)
    run = functools.partial(
        lottery.regroup, mask, mode="count", partitioner=by_first_column
    )
    assert len(run(min_columns=20).blocks) == 8
    assert run(min_columns=21).fallback


def test_missing_partitioner_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "mtkahypar", None)
    _partition._initialized.cache_clear()
    with pytest.raises(ImportError, match=r"sparsejax\[regroup\].*partition_at_random"):
        lottery.regroup(np.ones((9, 64), bool))
    _partition._initialized.cache_clear()


def test_random_groups_are_balanced():
    parts = lottery.partition_at_random(np.ones((21, 3), bool), 8, 4)
    assert set(np.bincount(parts)) == {2, 3}
    again = lottery.partition_at_random(np.ones((21, 3), bool), 8, 4)
    np.testing.assert_array_equal(parts, again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": np.ones((3, 64))}, "bool array of two or more"),
        ({"mask": np.ones(64, bool)}, "bool array of two or more"),
        ({"groups": 1}, "at least 2"),
        ({"mode": "all"}, "mode=.*stale.*got 'all'"),
        ({"ratio": 0}, "ratio=.*positive"),
        ({"min_rows": 0}, "min_rows=.*at least 1, got 0"),
        ({"min_columns": 0.5}, "min_columns=.*integer"),
        ({"column_density": 1.5}, "column_density=.*(0, 1]"),
        ({"layout": masks.Layout(batch=(0,), inputs=())}, "stacks layers"),
        ({"partitioner": lambda *_: np.zeros(5, int)}, "0 to 7 for each of the 64"),
        ({"partitioner": lambda *_: np.full(64, 8)}, "0 to 7"),
        ({"partitioner": lambda *_: np.zeros(64)}, "integer"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    options = {"mask": np.ones((3, 64), bool), "partitioner": at_once} | change
    with pytest.raises((ValueError, TypeError), match=message.replace("(0,", r"\(0,")):
        lottery.regroup(options.pop("mask"), **options)


def test_tree_reports_each_layer():
    wide, _, _ = planted(12)
    attention = np.ones((6, 4, 10), bool)  # [in, heads, head_dim]
    tree = {
        "attention": {
            name: {"kernel": attention if name == "query" else None}
            for name in ("query", "out")
        },
        "conv": {"kernel": jnp.asarray(wide.reshape(2, 2, 24, 256)), "bias": None},
        "narrow": {"kernel": np.ones((4, 8), bool)},
        "norm": {"scale": np.ones(256, bool)},
    }
    tree["attention"]["out"]["kernel"] = np.ones((4, 10, 8), bool)
    run = functools.partial(lottery.regroup_tree, tree, partitioner=by_first_column)
    found = run(mode="count", seed=6)
    fallback = {path: layer.fallback for path, layer in found.layers.items()}
    assert fallback == {
        "attention/query/kernel": False,
        "attention/out/kernel": True,
        "conv/kernel": False,
        "narrow/kernel": True,
    }
    assert len(found.layers["attention/query/kernel"].blocks[0][0]) == 40
    structured, rest = attention.size + wide.size, 4 * 10 * 8 + 4 * 8
    assert found.structured_fraction == structured / (structured + rest)
    np.testing.assert_array_equal(found.masks["conv"]["kernel"], tree["conv"]["kernel"])
    assert found.masks["conv"]["bias"] is None
    assert found.masks["norm"]["scale"] is tree["norm"]["scale"]
    assert all(layer.seed == 6 for layer in found.layers.values())

    found = run(mode="exact")
    params = {"kernel": jnp.ones((2, 2, 24, 256))}
    tx = sparse_optax.static(
        optax.sgd(0.1), masks={"kernel": found.masks["conv"]["kernel"]}
    )
    sparse = sparse_optax.apply_masks(params, tx.init(params))
    assert int(sparse["kernel"].sum()) == 8 * 32 * 8  # floor(0.6 * 12) + 1 columns


def test_tree_names_the_layer_at_fault():
    tree = {"a": {"kernel": np.ones((3, 64), bool)}}
    with pytest.raises(ValueError, match=r"a/kernel: regroup\(partitioner"):
        lottery.regroup_tree(tree, partitioner=lambda *_: np.zeros(5, int))
    with pytest.raises(ValueError, match="a mask of two or more .* got no mask"):
        lottery.regroup_tree({"a": None})
