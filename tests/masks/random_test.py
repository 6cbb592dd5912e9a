import itertools
import math
import zlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import initial

SHAPE = (5, 12)
SIZE = 60
STACK = (3, 4, 5)

# The tests of randomness draw with fixed keys: they pass or fail for good. Statistics
# that are standard normal if masks are random must stay within these bounds.
SIGMAS = 5


random_mask = jax.jit(initial.random_mask)
random_scores = jax.jit(initial.random_scores)


def random_masks(key, weights, k, axes=None):
    """Draw masks by name; of whole arrays, but where axes are given."""
    axes = [None] * len(weights) if axes is None else axes
    drawn = initial.random_masks(key, weights, k, axes)
    return dict(zip(weights, drawn, strict=True))


# Independence of other leaves


def test_a_mask_depends_on_the_key_and_its_own_name_alone():
    key = jax.random.key(1)
    shapes = {"a/kernel": (5, 12), "b/kernel": (5, 12), "c": (3, 4, 5), "d": ()}
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    together = random_masks(key, weights, [20, 20, 7, 1])
    reverse = dict(reversed(weights.items()))
    for name, mask in random_masks(key, reverse, [1, 7, 20, 20]).items():
        np.testing.assert_array_equal(mask, together[name])
    for name, k in [("a/kernel", 20), ("c", 7)]:
        own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        alone = random_mask(own_key, weights[name], k)
        np.testing.assert_array_equal(together[name], alone)
    assert (together["a/kernel"] != together["b/kernel"]).any()
    assert [int(mask.sum()) for mask in together.values()] == [20, 20, 7, 1]


def test_a_stacked_layer_draws_by_its_own_name():
    key, axes = jax.random.key(2), [(1, 2), None]
    weights = {"a": np.zeros(STACK, np.float32), "b": np.zeros(SHAPE, np.float32)}
    k = np.array([1, 20, 9], np.int32)
    masks = random_masks(key, weights, [k, 30], axes)
    for layer in range(3):
        own_key = jax.random.fold_in(key, zlib.crc32(f"a[{layer}]".encode()))
        alone = random_mask(own_key, weights["a"][layer], k[layer])
        np.testing.assert_array_equal(masks["a"][layer], alone)
    assert masks["b"].sum() == 30
    one_for_all = random_masks(key, weights, [7, 30], axes)
    assert one_for_all["a"].sum((1, 2)).tolist() == [7, 7, 7]


draw_two = jax.jit(lambda key, k: random_masks(key, {"a": A, "b": B}, list(k)))
A, B = np.zeros(SHAPE, np.float32), np.zeros(7, np.float16)


@hypothesis.given(
    st.integers(0, 2**32 - 1), st.integers(-2, SIZE + 2), st.integers(-2, 9)
)
def test_masks_drawn_together_have_exactly_their_counts(seed, k, other):
    masks = draw_two(jax.random.key(seed), np.array([k, other]))
    assert masks["a"].sum() == np.clip(k, 0, SIZE)
    assert masks["b"].sum() == np.clip(other, 0, 7)


def test_masks_drawn_together_settle_ties_as_one_drawn_alone_does():
    key, weight = jax.random.key(3), np.zeros((600, 901), np.float32)
    own_key = jax.random.fold_in(key, zlib.crc32(b"a"))
    scores = random_scores(jax.random.bits(own_key, (2,)), weight)
    falling = -np.sort(-np.asarray(scores), axis=None)
    first_of_a_tie = int(np.flatnonzero(falling[1:] == falling[:-1])[0]) + 1
    mask = random_masks(key, {"a": weight}, [first_of_a_tie])["a"]
    assert mask.sum() == first_of_a_tie
    np.testing.assert_array_equal(mask, random_mask(own_key, weight, first_of_a_tie))


def test_words_are_those_of_the_name():
    key, names = jax.random.key(4), ["a", "b", "a/b"]
    words = initial.random_words(key, names)
    assert words.shape == (3, 2) and words.dtype == jnp.uint32
    assert len(np.unique(words)) == 6
    np.testing.assert_array_equal(initial.random_words(key, names[2:]), words[2:])
    other = initial.random_words(jax.random.key(5), names)
    assert not np.intersect1d(words, other).size


# Randomness

POSITIONS = 64
ACTIVE = 16
DRAWS = 4096


@jax.jit
def masks_of(words):
    """Return bool [draws, positions] with as many masks as there are words."""
    scores = jax.vmap(initial.random_scores, (0, None))(words, jnp.zeros(POSITIONS))
    return scores >= jnp.sort(scores, axis=1)[:, -ACTIVE, None]


@pytest.fixture(scope="module")
def many_masks():
    """Masks of consecutive seeds, bool [draws, positions]."""
    keys = jax.vmap(jax.random.key)(np.arange(DRAWS))
    draw = jax.jit(jax.vmap(lambda key: initial.random_mask(key, SQUARE, ACTIVE)))
    masks = np.asarray(draw(keys)).reshape(DRAWS, POSITIONS)
    assert (masks.sum(axis=1) == ACTIVE).all()
    return masks


SQUARE = np.zeros((8, 8), np.float32)


def standardise(counts, draws, probability):
    """Return how many standard deviations binomial counts are off."""
    deviation = math.sqrt(draws * probability * (1 - probability))
    return (np.asarray(counts) - draws * probability) / deviation


def assert_chi_square(counts, freedom):
    """Check counts that must be equally likely, all of them, or too even to be true."""
    expected = np.mean(counts)
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert abs(statistic - freedom) < SIGMAS * math.sqrt(2 * freedom)


def assert_unrelated(one, other):
    """Check that two sequences of masks share as many positions as chance has it."""
    mean = ACTIVE**2 / POSITIONS
    variance = mean * (1 - ACTIVE / POSITIONS) ** 2 * POSITIONS / (POSITIONS - 1)
    shared = (one & other).sum(axis=1)
    assert abs(shared.mean() - mean) < SIGMAS * math.sqrt(variance / len(shared))
    assert 0.8 < shared.var() / variance < 1.2


def test_every_position_is_equally_likely(many_masks):
    density = ACTIVE / POSITIONS
    off = standardise(many_masks.sum(axis=0), DRAWS, density)
    # The counts of a draw add up to what is active: one degree of freedom is gone.
    statistic = (off**2).sum() * (POSITIONS - 1) / POSITIONS
    assert np.abs(off).max() < SIGMAS
    assert abs(statistic - (POSITIONS - 1)) < SIGMAS * math.sqrt(2 * (POSITIONS - 1))


def test_every_pair_of_positions_is_equally_likely(many_masks):
    both = many_masks.T.astype(np.float64) @ many_masks
    pairs = both[np.triu_indices(POSITIONS, 1)]
    probability = ACTIVE * (ACTIVE - 1) / (POSITIONS * (POSITIONS - 1))
    off = standardise(pairs, DRAWS, probability)
    assert np.abs(off).max() < SIGMAS
    assert 0.8 < (off**2).mean() < 1.2
    neighbours = standardise(np.diag(both, 1), DRAWS, probability)
    assert abs(neighbours.sum()) < SIGMAS * math.sqrt(len(neighbours))


def test_masks_of_consecutive_seeds_are_unrelated(many_masks):
    assert len(np.unique(many_masks, axis=0)) == DRAWS
    assert_unrelated(many_masks[1:], many_masks[:-1])


def test_masks_of_consecutive_steps_and_of_other_names_are_unrelated():
    names = [f"layers/{i}/kernel" for i in range(4)]
    keys = jax.vmap(lambda step: jax.random.fold_in(jax.random.key(0), step))
    words = jax.jit(jax.vmap(lambda key: initial.random_words(key, names)))
    masks = masks_of(words(keys(np.arange(DRAWS))).reshape(-1, 2))
    masks = np.asarray(masks).reshape(DRAWS, 4, POSITIONS)
    for name in range(4):
        assert_unrelated(masks[1:, name], masks[:-1, name])
        assert_unrelated(masks[:, name], masks[:, name - 1])


@pytest.mark.parametrize("word", [0, 1])
def test_masks_that_share_one_of_their_words_are_unrelated(word):
    words = jnp.full((DRAWS, 2), 7, jnp.uint32)
    words = words.at[:, word].set(jax.random.bits(jax.random.key(5), (DRAWS,)))
    masks = np.asarray(masks_of(words))
    assert_unrelated(masks[1:], masks[:-1])


@pytest.mark.parametrize(
    ("stride", "draws"), [(1, DRAWS), (3, DRAWS), (2**10, DRAWS), (2**16, 256)]
)
def test_every_order_of_four_scores_is_equally_likely(stride, draws):
    words = jax.random.bits(jax.random.key(6), (draws, 2))
    like = jnp.zeros((4, stride))
    at = jax.jit(jax.vmap(lambda word: initial.random_scores(word, like)[:, 0]))
    orders = np.argsort(at(words), axis=1) @ 4 ** np.arange(4)
    permutations = np.array(list(itertools.permutations(range(4)))) @ 4 ** np.arange(4)
    assert_chi_square((orders[:, None] == permutations).sum(axis=0), 23)


def test_a_large_mask_has_no_pattern():
    size = 2**18
    mask = np.asarray(
        random_mask(jax.random.key(7), np.zeros(size, np.float32), size // 4)
    )
    centred = (mask - 0.25) / math.sqrt(0.25 * 0.75)
    spectrum = np.abs(np.fft.rfft(centred)[1:-1]) ** 2 / size
    # The squares are exponential: the largest of n is about log(n).
    assert 0.5 * math.log(size) < spectrum.max() < 2 * math.log(size)
    correlations = np.fft.irfft(np.abs(np.fft.rfft(centred)) ** 2)[1 : size // 2] / size
    assert np.abs(correlations).max() * math.sqrt(size) < 1.3 * SIGMAS
    for block in (2, 64, 1024):
        slack = SIGMAS * math.sqrt(2 * block / size)
        for blocks in (mask.reshape(-1, block), mask.reshape(block, -1).T):
            variance = blocks.sum(axis=1).var() / (block * 0.25 * 0.75)
            assert abs(variance - 1) < slack


def test_scores_are_finite_and_nearly_all_differ():
    scores = np.asarray(random_scores(jnp.array([1, 2], jnp.uint32), jnp.zeros(2**18)))
    assert scores.dtype == np.float32
    assert scores.min() >= 0 and scores.max() < 2
    # 30 random bits: 32 pairs of 2**18 collide on average.
    assert len(scores) - len(np.unique(scores)) < 32 + SIGMAS * math.sqrt(32)


def test_a_score_depends_on_the_linear_index_alone():
    words = jnp.array([3, 4], jnp.uint32)
    flat = random_scores(words, jnp.zeros(SIZE))
    for shape in [(5, 12), (12, 5), (3, 4, 5), (60, 1)]:
        scores = random_scores(words, jnp.zeros(shape, jnp.bfloat16))
        np.testing.assert_array_equal(scores.reshape(-1), flat)
    longer = random_scores(words, jnp.zeros(2 * SIZE))
    np.testing.assert_array_equal(longer[:SIZE], flat)
    assert random_scores(words, jnp.zeros(())) == flat[0]
