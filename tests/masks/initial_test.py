import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax.masks import initial
from sparsejax.masks.layout import Layout

SHAPE = (5, 12)
SIZE = 60
STACK = (3, 4, 5)

random_mask = jax.jit(initial.random_mask, static_argnames="axis")
random_scores = jax.jit(initial.random_scores)
sparse_init = jax.jit(initial.sparse_init, static_argnames=("layout", "variant"))


# Counts


@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(-2, SIZE + 2))
def test_a_mask_has_exactly_k_active_weights(seed, k):
    mask = random_mask(jax.random.key(seed), np.zeros(SHAPE, np.float32), k)
    assert mask.dtype == bool and mask.shape == SHAPE
    assert mask.sum() == np.clip(k, 0, SIZE)


@pytest.mark.parametrize(("axis", "slices"), [((1, 2), (3,)), (0, (4, 5))])
@hypothesis.given(st.integers(0, 2**32 - 1), st.data())
def test_every_slice_has_its_own_count(axis, slices, seed, data):
    most = math.prod(STACK) // math.prod(slices)
    k = data.draw(hnp.arrays(np.int32, slices, elements=st.integers(0, most)))
    mask = random_mask(jax.random.key(seed), np.zeros(STACK, np.float32), k, axis=axis)
    np.testing.assert_array_equal(mask.sum(axis), k)


def test_slices_are_drawn_apart():
    stack = random_mask(jax.random.key(0), np.ones((4, 30)), 15, axis=1)
    assert len(np.unique(stack, axis=0)) == 4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8], ids=str)
def test_only_the_shape_of_a_weight_matters(dtype):
    key = jax.random.key(3)
    mask = random_mask(key, np.zeros(SHAPE, np.float32), 20)
    other = random_mask(key, jnp.full(SHAPE, 7, dtype), 20)
    np.testing.assert_array_equal(other, mask)


def test_old_and_new_keys_and_eager_draws_are_the_same():
    weight = np.zeros(SHAPE, np.float32)
    mask = random_mask(jax.random.key(5), weight, 20)
    old = random_mask(jax.random.PRNGKey(5), weight, 20)
    eager = initial.random_mask(jax.random.key(5), weight, 20)
    np.testing.assert_array_equal(old, mask)
    np.testing.assert_array_equal(eager, mask)


# Meshes

SHARDED = (16, 24)
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESHES = [
    (P("x", "y"), AUTO),
    (P(None, ("x", "y")), AUTO),
    (P("x", "y"), EXPLICIT),
    (P("y"), EXPLICIT),
]
each_mesh = pytest.mark.parametrize(("spec", "kind"), MESHES, ids=str)


def put(value, spec, kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    return jax.device_put(value, NamedSharding(mesh, spec))


@jax.jit
def random_masks(key, weights):
    return initial.random_masks(key, weights, [100], [None])


@each_mesh
def test_masks_are_the_same_on_every_mesh(spec, kind):
    key, weight = jax.random.key(8), np.zeros(SHARDED, np.float32)
    sharded = put(weight, spec, kind)
    with jax.set_mesh(sharded.sharding.mesh):
        mask = random_mask(key, sharded, 100)
        slices = random_mask(key, sharded, 5, axis=0)
        (named,) = random_masks(key, {"a": sharded})
        scores = random_scores(jnp.array([3, 4], jnp.uint32), sharded)
    np.testing.assert_array_equal(mask, random_mask(key, weight, 100))
    (expected,) = random_masks(key, {"a": weight})
    np.testing.assert_array_equal(named, expected)
    np.testing.assert_array_equal(slices, random_mask(key, weight, 5, axis=0))
    flat = random_scores(jnp.array([3, 4], jnp.uint32), jnp.zeros(16 * 24))
    np.testing.assert_array_equal(scores, flat.reshape(SHARDED))


@each_mesh
def test_masks_are_sharded_as_the_weight_is(spec, kind):
    sharded = put(np.zeros(SHARDED, np.float32), spec, kind)
    with jax.set_mesh(sharded.sharding.mesh):
        eager = initial.random_mask(jax.random.key(0), sharded, 100)
        mask = random_mask(jax.random.key(0), sharded, 100)
        scores = random_scores(jnp.array([3, 4], jnp.uint32), sharded)
    # Inside jit, what XLA does not have from types it decides for itself.
    compiled = () if kind == AxisType.Auto else (mask, scores)
    for array in (eager, *compiled):
        assert array.sharding.is_equivalent_to(sharded.sharding, 2)


# First weights

# Keys are fixed: what is drawn passes or fails for good. A statistic that is standard
# normal if the weights are must stay within this bound.
SIGMAS = 5

QUERY = Layout(outputs=(-2, -1), inputs=(-3,))
OUT = Layout(outputs=(-1,), inputs=(-3, -2))
FAN_INS = [0, 1, 4, 16, 64]
NEURONS = 512  # of each fan-in


@pytest.fixture(scope="module")
def mask_of_many_fan_ins():
    """Bool [64, neurons]."""
    k = np.repeat(FAN_INS, NEURONS).astype(np.int32)
    weight = np.zeros((64, len(k)), np.float32)
    return np.asarray(random_mask(jax.random.key(9), weight, k, axis=0))


@pytest.mark.parametrize(
    ("variant", "std"),
    [("variance", lambda k: math.sqrt(2 / k)), ("std", lambda k: 2 / k)],
)
def test_the_scale_of_a_neuron_fits_its_own_fan_in(variant, std, mask_of_many_fan_ins):
    mask = mask_of_many_fan_ins
    weight = jnp.ones(mask.shape)
    drawn = np.asarray(sparse_init(jax.random.key(10), weight, mask, variant=variant))
    assert drawn.dtype == np.float32
    np.testing.assert_array_equal(drawn != 0, mask)
    standard = []
    for group, k in enumerate(FAN_INS[1:], 1):
        columns = np.s_[:, group * NEURONS : (group + 1) * NEURONS]
        values = drawn[columns][mask[columns]] / std(k)
        n = NEURONS * k
        assert abs(values.mean()) < SIGMAS / math.sqrt(n)
        assert abs(values.std() - 1) < SIGMAS / math.sqrt(2 * n)
        standard.append(values)
    standard = np.concatenate(standard)
    for bound in (-2, -1, 0, 1, 2):
        probability = (1 + math.erf(bound / math.sqrt(2))) / 2
        below = (standard < bound).sum()
        deviation = math.sqrt(len(standard) * probability * (1 - probability))
        assert abs(below - len(standard) * probability) < SIGMAS * deviation


def test_the_variance_is_the_default():
    weight, mask = jnp.ones(SHAPE), np.arange(SIZE).reshape(SHAPE) % 3 == 0
    key = jax.random.key(11)
    default = sparse_init(key, weight, mask)
    explicit = sparse_init(key, weight, mask, variant="variance")
    np.testing.assert_array_equal(default, explicit)


LAYOUTS = [  # layout, shape, the axes that a neuron sums over
    (None, (24,), ()),
    (None, (3, 3, 4, 8), (0, 1, 2)),
    (QUERY, (12, 2, 8), 0),
    (OUT, (2, 8, 12), (0, 1)),
    (Layout(batch=(0,)), (3, 8, 12), 1),
]


@pytest.mark.parametrize(("layout", "shape", "axes"), LAYOUTS, ids=str)
def test_the_fan_in_is_that_of_the_layout(layout, shape, axes):
    weight = np.zeros(shape, np.float32)
    mask = np.random.default_rng(0).random(shape) < 0.3
    dense = np.ones(shape, bool)
    fan_in, full = mask.sum(axes, keepdims=True), dense.sum(axes, keepdims=True)
    assert fan_in.max() > fan_in.min()
    key = jax.random.key(12)
    drawn = sparse_init(key, weight, mask, layout=layout)
    reference = sparse_init(key, weight, dense, layout=layout)
    expected = np.where(mask, reference * np.sqrt(full / np.maximum(fan_in, 1)), 0)
    np.testing.assert_allclose(drawn, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
def test_narrow_weights_are_rounded_from_float32(dtype):
    mask = np.arange(SIZE).reshape(SHAPE) % 3 == 0
    key = jax.random.key(13)
    narrow = sparse_init(key, jnp.ones(SHAPE, dtype), mask)
    wide = sparse_init(key, jnp.ones(SHAPE), mask)
    assert narrow.dtype == dtype
    np.testing.assert_array_equal(narrow, wide.astype(dtype))
    assert not np.asarray(narrow)[~mask].view(np.uint16).any()


def test_a_neuron_without_inputs_is_zero():
    mask = np.zeros((8, 3), bool)
    mask[:, 1] = True
    weight = sparse_init(jax.random.key(14), jnp.full((8, 3), jnp.nan), mask)
    assert np.isfinite(weight).all()
    np.testing.assert_array_equal(weight != 0, mask)


def test_first_weights_depend_on_the_key():
    mask = np.ones(SHAPE, bool)
    one, two = (sparse_init(jax.random.key(i), jnp.ones(SHAPE), mask) for i in (0, 1))
    assert not np.intersect1d(one, two).size


@each_mesh
def test_first_weights_are_the_same_on_every_mesh(spec, kind):
    key, weight = jax.random.key(15), np.zeros(SHARDED, np.float32)
    mask = np.random.default_rng(1).random(SHARDED) < 0.3
    sharded, where = put(weight, spec, kind), put(mask, spec, kind)
    with jax.set_mesh(sharded.sharding.mesh):
        drawn = sparse_init(key, sharded, where)
    expected = sparse_init(key, weight, mask)
    np.testing.assert_allclose(drawn, expected, rtol=1e-6)
    assert drawn.sharding.is_equivalent_to(sharded.sharding, 2)


def test_nothing_relies_on_implicit_promotion():
    key, weight = jax.random.key(16), jnp.ones(SHAPE)
    with jax.numpy_dtype_promotion("strict"):
        mask = random_mask(key, weight, 20)
        (together,) = initial.random_masks(key, {"a": weight}, [20], [None])
        for variant in ("variance", "std"):
            drawn = sparse_init(key, weight.astype(jnp.bfloat16), mask, variant=variant)
            np.testing.assert_array_equal(drawn != 0, mask)
    assert together.sum() == 20


# Bad input


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (
            r'variant=\.\.\.\) must be "variance" or "std", got \'he\'',
            {"variant": "he"},
        ),
        (
            r"the mask must have the shape of the weight, \(5, 12\), got \(12, 5\)",
            {"mask": np.ones((12, 5), bool)},
        ),
        ("different axes of an array of 2 dimensions", {"layout": QUERY}),
    ],
)
def test_first_weights_that_cannot_be_drawn_are_refused(message, arguments):
    arguments = {"mask": np.ones(SHAPE, bool), **arguments}
    with pytest.raises(ValueError, match=message):
        initial.sparse_init(jax.random.key(0), jnp.ones(SHAPE), **arguments)


@pytest.mark.parametrize(
    ("error", "message", "k", "axis"),
    [
        (TypeError, "k must be an integer, got dtype float32", 0.5, None),
        (ValueError, r"shape \(\), got shape \(2,\)", [1, 2], None),
        (
            ValueError,
            r"one value per slice, shape \(12,\), got shape \(5,\)",
            [1] * 5,
            0,
        ),
    ],
)
def test_masks_that_cannot_be_drawn_are_refused(error, message, k, axis):
    key, weight, k = jax.random.key(0), jnp.ones(SHAPE), jnp.asarray(k)
    with pytest.raises(error, match=message):
        initial.random_mask(key, weight, k, axis=axis)
