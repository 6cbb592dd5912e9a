"""N:M and block masks against brute force, group by group and block by block."""

import functools
import math
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

from sparsejax.masks import NM, Block, Layout, block_mask, nm_mask, patterned
from sparsejax.masks.layout import Leaf

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 6e4]
BLOCK = Block(neurons=3, inputs=2)

# Weights whose last input axis has length 8 and whose last output axis has length 6.
FORMS = {
    "dense": ((8, 6), Layout()),
    "conv": ((2, 3, 8, 6), Layout()),
    "stack": ((2, 8, 6), Layout(batch=(0,))),
    "query": ((8, 2, 6), Layout(outputs=(-2, -1), inputs=(-3,))),
    "out": ((2, 8, 6), Layout(outputs=(-1,), inputs=(-3, -2))),
    "torch": ((6, 8, 2), Layout(outputs=(0,), inputs=(1,))),
}


@pytest.fixture(autouse=True, scope="module")
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def values(rng, shape, kind):
    """Draw multiples of 1/8, which add exactly in any order."""
    drawn = rng.integers(-500, 501, shape) / 8
    if kind == "ties":
        drawn = rng.integers(-2, 3, shape) / 2
    if kind == "special":
        drawn = np.where(rng.random(shape) < 0.2, rng.choice(SPECIAL, shape), drawn)
    return np.float32(drawn)


@st.composite
def arrays(draw, shape, special=True):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kinds = ["distinct", "ties", *["special"] * special]
    return values(rng, shape, draw(st.sampled_from(kinds)))


def tiles(shape, layout, neurons, inputs):
    """Yield each tile by the index of its first position, with all of its positions."""
    own = layout.resolve(len(shape))
    lengths = [1] * len(shape)
    lengths[own.outputs[-1]], lengths[own.inputs[-1]] = neurons, inputs
    for corner in np.ndindex(*shape):
        if all(i % n == 0 for i, n in zip(corner, lengths, strict=True)):
            ranges = (range(i, i + n) for i, n in zip(corner, lengths, strict=True))
            yield (
                corner,
                [
                    tuple(index)
                    for index in np.stack(np.meshgrid(*ranges, indexing="ij"), -1)
                    .reshape(-1, len(shape))
                    .tolist()
                ],
            )


def best(scores, k):
    """List the ``k`` best keys of a dict: no NaN, and of equal ones the first."""
    numbers = [key for key, score in scores.items() if not np.isnan(score)]
    return sorted(numbers, key=lambda key: (-float(scores[key]), key))[: max(k, 0)]


def nm_oracle(scores, n, m, layout):
    mask = np.zeros(scores.shape, bool)
    for corner, members in tiles(scores.shape, layout, 1, m):
        own = n if np.ndim(n) == 0 else n[corner[layout.batch[0]]]
        for index in best({index: scores[index] for index in members}, own):
            mask[index] = True
    return mask


def pooled(scores, layout, block):
    """Return the sum of each block, in an array of blocks."""
    found = list(tiles(scores.shape, layout, block.neurons, block.inputs))
    own = layout.resolve(scores.ndim)
    shape = list(scores.shape)
    shape[own.outputs[-1]] //= block.neurons
    shape[own.inputs[-1]] //= block.inputs
    sums = [sum(float(scores[index]) for index in members) for _, members in found]
    return np.float32(sums).reshape(shape)


def block_oracle(scores, k, layout, block):
    mask = np.zeros(scores.shape, bool)
    sums = pooled(scores, layout, block)
    chosen = oracles.top_k(sums, k, axis=layout.layer_axes(scores.ndim))
    found = list(tiles(scores.shape, layout, block.neurons, block.inputs))
    for (_, members), active in zip(found, chosen.ravel(), strict=True):
        for index in members:
            mask[index] = active
    return mask


nm_compiled = jax.jit(nm_mask, static_argnames=("m", "layout"))
block_compiled = jax.jit(block_mask, static_argnames=("block", "layout"))


# Projections


@pytest.mark.parametrize("form", FORMS)
@hypothesis.given(data=st.data())
def test_nm_is_the_best_of_every_group(form, data):
    shape, layout = FORMS[form]
    scores, n = data.draw(arrays(shape)), data.draw(st.integers(-1, 5))
    mask = nm_compiled(scores, n, 4, layout=layout)
    np.testing.assert_array_equal(mask, nm_oracle(scores, n, 4, layout))


@pytest.mark.parametrize("m", [1, 2, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis.given(scores=arrays((8, 6)), n=st.integers(0, 8))
def test_nm_of_any_size_and_dtype(dtype, m, scores, n):
    scores = jnp.asarray(scores, dtype)
    mask = nm_compiled(scores, n, m)
    exact = np.asarray(scores, np.float32)
    np.testing.assert_array_equal(mask, nm_oracle(exact, n, m, Layout()))


@pytest.mark.parametrize("form", FORMS)
@hypothesis.given(data=st.data())
def test_blocks_are_the_best_of_every_layer(form, data):
    shape, layout = FORMS[form]
    scores, k = data.draw(arrays(shape)), data.draw(st.integers(-1, 12))
    with np.errstate(invalid="ignore"):
        expected = block_oracle(scores, k, layout, BLOCK)
    mask = block_compiled(scores, k, BLOCK, layout=layout)
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis.given(scores=arrays((8, 6)), k=st.integers(0, 8))
def test_blocks_of_any_dtype(dtype, scores, k):
    scores = jnp.asarray(scores, dtype)
    with np.errstate(invalid="ignore"):
        expected = block_oracle(np.asarray(scores, np.float32), k, Layout(), BLOCK)
    np.testing.assert_array_equal(block_compiled(scores, k, BLOCK), expected)


def test_two_of_four_by_hand():
    scores = jnp.array([[1.0, 2, 3, 4, 4, 3, 2, 1], [5, 5, 5, 5, 0, -1, jnp.nan, 7]])
    mask = nm_mask(scores.T, 2, 4).T
    expected = [[0, 0, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0, 0, 1]]
    np.testing.assert_array_equal(mask, np.array(expected, bool))
    one = nm_mask(scores.T, 1, 4).T
    expected = [[0, 0, 0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(one, np.array(expected, bool))
    np.testing.assert_array_equal(nm_mask(scores.T, 4, 4), ~np.isnan(scores.T))


def test_groups_of_a_convolution_are_input_channels():
    """At one position of the kernel, as in OHWI order a row is read."""
    rng = np.random.default_rng(0)
    kernel = np.float32(rng.permutation(3 * 3 * 8 * 2).reshape(3, 3, 8, 2))
    rows = kernel.transpose(3, 0, 1, 2).reshape(-1, 4)
    expected = rows >= np.sort(rows)[:, 2:3]
    mask = np.asarray(nm_mask(kernel, 2, 4)).transpose(3, 0, 1, 2).reshape(-1, 4)
    np.testing.assert_array_equal(mask, expected)


def test_stacked_layers_have_counts_of_their_own():
    scores = values(np.random.default_rng(0), (2, 8, 6), "ties")
    layout = FORMS["stack"][1]
    n, k = np.array([1, 3]), np.array([2, 5])
    mask = nm_compiled(scores, n, 4, layout=layout)
    np.testing.assert_array_equal(mask, nm_oracle(scores, n, 4, layout))
    mask = block_compiled(scores, k, BLOCK, layout=layout)
    np.testing.assert_array_equal(mask, block_oracle(scores, k, layout, BLOCK))


@pytest.mark.parametrize("inputs", [1, 2, 7])
def test_blocks_are_added_in_one_order(inputs):
    """Pairwise and by halves: rounding is the same in any program, bit for bit."""
    (leaf,) = patterned.patterned_leaves(
        [Leaf("fc", (14, 20), Layout(), None)], Block(neurons=5, inputs=inputs)
    )
    weight = np.float32(np.random.default_rng(0).normal(size=(14, 20)))

    def fold(x, axis):
        parts = list(np.moveaxis(x, axis, 0))
        while len(parts) > 1:
            half = len(parts) // 2
            pairs = zip(parts[:half], parts[half : 2 * half], strict=True)
            parts = [a + b for a, b in pairs] + parts[2 * half :]
        return parts[0]

    expected = fold(fold(abs(weight).reshape(14 // inputs, inputs, 4, 5), 3), 1)
    eager = leaf.pool(jnp.asarray(weight))
    np.testing.assert_array_equal(eager, expected)
    np.testing.assert_array_equal(jax.jit(leaf.pool)(weight), expected)
    many = jax.jit(jax.vmap(leaf.pool))(np.stack([weight, -weight]))
    np.testing.assert_array_equal(many, [expected, expected])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_tiles_stay_on_their_devices(kind):
    """What lies on one device is selected there; what does not, is all the same."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    weight = values(np.random.default_rng(0), (3, 32, 8), "distinct")
    project = jax.jit(lambda w: (nm_mask(w, 2, 4), block_mask(w, 9, Block(2, 4))))
    expected = jax.device_get(project(weight))
    for spec, whole in (
        (P(None, "x", "y"), True),
        (P(None, "y", ("x",)), True),
        (P(None, None, ("y", "x")), False),
        (P(None, ("x", "y")), True),
    ):
        sharding = NamedSharding(mesh, spec)
        with jax.set_mesh(mesh):
            sharded = jax.device_put(weight, sharding)
            groups = jax.jit(lambda w: nm_mask(w, 2, 4))
            masks = project(sharded)
        jax.tree.map(np.testing.assert_array_equal, masks, expected)
        assert masks[0].sharding.is_equivalent_to(sharding, 3)
        if whole or kind == AxisType.Explicit:
            assert masks[1].sharding.is_equivalent_to(sharding, 3)
        text = groups.lower(sharded).compile().as_text()
        assert not re.search("all-|collective-|reduce-scatter", text)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: nm_mask(x, 2, 3), ValueError, "tiles of 3 inputs .* length 8"),
        (lambda x: nm_mask(x, 2, 0), ValueError, r"NM\(m=...\) must be an integer"),
        (lambda x: nm_mask(x, 2.0, 4), TypeError, "must be an integer, got dtype"),
        (lambda x: nm_mask(x > 0, 2, 4), TypeError, "float16, got bool"),
        (lambda x: nm_mask(x[:, 0], 2, 4), ValueError, "length 1"),
        (
            lambda x: block_mask(x, 2, Block(4, 2)),
            ValueError,
            "tiles of 4 neurons .* length 6 in shape",
        ),
        (lambda x: block_mask(x, 2.0, BLOCK), TypeError, "k must be an integer"),
        (lambda x: NM(3, 2), ValueError, r"NM\(n=3, m=2\): .* at most m"),
        (lambda x: NM(0, 2), ValueError, r"NM\(n=...\) .* at least 1, got 0"),
        (lambda x: NM(True, 2), ValueError, "got True"),
        (lambda x: Block(0, 2), ValueError, r"Block\(neurons=...\)"),
        (lambda x: Block(1, 1.5), ValueError, r"Block\(inputs=...\) .* got 1.5"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(jnp.ones((8, 6)))


# Patterns of leaves

LEAVES = [Leaf(name, *FORMS[name], None) for name in ("dense", "conv", "stack")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (None, [Block(1, 1)] * 3),
        (NM(2, 4), [NM(2, 4)] * 3),
        ({"^conv": None, "n": NM(2, 4)}, [NM(2, 4), Block(1, 1), Block(1, 1)]),
        (
            lambda path, shape: BLOCK if len(shape) > 2 else None,
            [Block(1, 1), BLOCK, BLOCK],
        ),
    ],
)
def test_every_leaf_gets_its_pattern(pattern, expected):
    found = patterned.patterned_leaves(LEAVES, pattern)
    assert [leaf.pattern for leaf in found] == expected
    assert [leaf.path for leaf in found] == ["dense", "conv", "stack"]


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ({"fc": NM(2, 4)}, ValueError, "pattern=: .* 'fc' .* matches none"),
        (Block(4, 4), ValueError, "pattern= for dense: .* 4 neurons .* Give this leaf"),
        ({"conv": NM(1, 3)}, ValueError, "pattern= for conv: .*n=1, m=3.* 3 inputs"),
        (lambda path, shape: 4, TypeError, "pattern= for dense must be .*, got 4"),
    ],
)
def test_patterns_that_do_not_fit(pattern, error, message):
    with pytest.raises(error, match=message):
        patterned.patterned_leaves(LEAVES, pattern)


# First masks and updates

PATTERNS = {"groups": NM(2, 4), "blocks": BLOCK}


def budgets_of(leaves, units):
    """Return budgets of so many blocks a layer, or weights a group."""
    return [
        leaf.budget(units * (leaf.pattern.area if leaf.pattern == BLOCK else 1))
        for leaf in leaves
    ]


@pytest.mark.parametrize("kind", PATTERNS)
def test_first_masks_keep_the_pattern_and_the_budget(kind):
    leaves = patterned.patterned_leaves(LEAVES, PATTERNS[kind])
    weights = [jnp.ones(leaf.tiles.shape) for leaf in leaves]
    budgets = [
        np.full(leaf.tiles.shape[:1] if leaf.path == "stack" else (), n)
        for leaf, n in zip(leaves, budgets_of(leaves, 3), strict=True)
    ]
    draw = jax.jit(
        lambda *arrays: patterned.draw_all(jax.random.key(0), *arrays), static_argnums=0
    )
    masks = draw(tuple(leaves), weights, budgets)
    (alone,) = draw(tuple(leaves[1:2]), weights[1:2], budgets[1:2])
    np.testing.assert_array_equal(alone, masks[1])
    for leaf, mask, budget in zip(leaves, masks, budgets, strict=True):
        axes = leaf.layer_axes
        np.testing.assert_array_equal(mask.sum(axes), budget)
        tile = {"neurons": 1, "inputs": 1} | leaf.pattern.tile
        counts = {
            sum(bool(mask[index]) for index in members)
            for _, members in tiles(mask.shape, leaf.layout, **tile)
        }
        assert counts == ({2} if kind == "groups" else {0, 6})


def test_first_masks_of_groups_are_uniform():
    (leaf,) = patterned.patterned_leaves(
        [Leaf("fc", (4, 6000), Layout(), None)], NM(2, 4)
    )
    weight = jnp.ones(leaf.tiles.shape)
    (mask,) = patterned.draw_all(jax.random.key(0), [leaf], [weight], [12_000])
    codes = np.array([1, 2, 4, 8]) @ np.asarray(mask)
    found, counts = np.unique(codes, return_counts=True)
    assert found.tolist() == [3, 5, 6, 9, 10, 12]
    assert abs(counts - 1000).max() < 5 * math.sqrt(1000)


@functools.partial(jax.jit, static_argnums=0)
def update(leaf, mask, weight, gradient, n_drop):
    layers = [leaf.tiles.shape[i] for i in leaf.tiles.batch]
    budget = jnp.sum(mask, leaf.layer_axes, dtype=jnp.int32).reshape(layers)
    (new,) = patterned.drop_and_grow_all(
        [leaf],
        [mask],
        [weight],
        grow=[leaf.pool(gradient)],
        budgets=[budget],
        n_drop=lambda active: jnp.full_like(active, n_drop),
    )
    return new


def groups_oracle(leaf, mask, weight, gradient, n_drop):
    """Drop the smallest of each layer, then fill every group by its own gradients.

    A NaN counts as 0 where the mask is active.
    """
    zero = lambda x: np.where(mask & np.isnan(x), np.float32(0), abs(x))
    weight, gradient = zero(weight), zero(gradient)
    axes = leaf.layer_axes
    new = oracles.prune(mask, weight, mask.sum(axes) - n_drop, axes)
    for _, members in tiles(mask.shape, leaf.layout, 1, leaf.pattern.m):
        free = {index: gradient[index] for index in members if not new[index]}
        for index in best(free, leaf.pattern.n - leaf.pattern.m + len(free)):
            new[index] = True
    return new


@pytest.mark.parametrize("form", ["dense", "conv", "stack", "torch"])
@hypothesis.given(data=st.data())
def test_groups_drop_in_the_layer_and_grow_in_the_group(form, data):
    (leaf,) = patterned.patterned_leaves([Leaf("fc", *FORMS[form], None)], NM(2, 4))
    shape = leaf.tiles.shape
    weight, gradient = data.draw(arrays(shape)), data.draw(arrays(shape))
    scores = np.random.default_rng(0).permutation(math.prod(shape)).reshape(shape)
    mask = nm_oracle(scores, 2, 4, leaf.layout)
    weight = np.where(mask, weight, np.float32(0))
    n_drop = data.draw(st.integers(0, leaf.size // 2))
    new = update(leaf, mask, weight, gradient, n_drop)
    expected = groups_oracle(leaf, mask, weight, gradient, n_drop)
    np.testing.assert_array_equal(new, expected)


@pytest.mark.parametrize("kind", PATTERNS)
def test_gradients_of_nan_grow_nothing(kind):
    (leaf,) = patterned.patterned_leaves(
        [Leaf("fc", *FORMS["dense"], None)], PATTERNS[kind]
    )
    scores = np.random.default_rng(0).permutation(48).reshape(8, 6)
    project = {
        "groups": lambda: nm_oracle(scores, 2, 4, leaf.layout),
        "blocks": lambda: block_oracle(scores, 4, leaf.layout, BLOCK),
    }
    mask = project[kind]()
    nan = np.full((8, 6), np.nan, np.float32)
    new = update(leaf, mask, np.float32(mask), nan, 3)
    np.testing.assert_array_equal(new, mask)


@pytest.mark.parametrize("form", ["dense", "conv", "stack"])
@hypothesis.given(data=st.data())
def test_blocks_drop_and_grow_as_weights_do(form, data):
    (leaf,) = patterned.patterned_leaves([Leaf("fc", *FORMS[form], None)], BLOCK)
    shape, layout = leaf.tiles.shape, leaf.layout
    weight, gradient = (data.draw(arrays(shape, special=False)) for _ in range(2))
    scores = np.random.default_rng(0).permutation(math.prod(shape)).reshape(shape)
    mask = block_oracle(scores, 4, layout, BLOCK)
    weight = np.where(mask, weight, np.float32(0))
    n_drop = data.draw(st.integers(0, 4))
    new = np.asarray(update(leaf, mask, weight, gradient, n_drop))
    magnitudes = (pooled(abs(x), layout, BLOCK) for x in (weight, gradient))
    expected = oracles.drop_and_grow(
        pooled(mask, layout, BLOCK) > 0, *magnitudes, n_drop, leaf.layer_axes
    )
    areas = pooled(new, layout, BLOCK)
    np.testing.assert_array_equal(areas, np.where(expected, BLOCK.area, 0))
