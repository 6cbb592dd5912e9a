import jax
import jax.numpy as jnp
import numpy as np
import plans
import pytest
from flax import nnx

from sparsejax.compaction import CompactionError
from sparsejax.compaction import exact_norms as norms
from sparsejax.compaction.rebuild import rebuild

FULL = 12
GONE = [1, 4, 5]
LEFT = [0, 2, 3, 6, 7, 8, 9, 10, 11]


def operations(fn, *arguments):
    """The names and the numbers of a program, but for those that move entries."""

    def of(jaxpr):
        for eqn in jaxpr.eqns:
            inner = [p for p in eqn.params.values() if hasattr(p, "jaxpr")]
            if inner:
                yield from of(inner[0].jaxpr)
            elif eqn.primitive.name != "reshape":
                numbers = [float(v.val) for v in eqn.invars if hasattr(v, "val")]
                yield eqn.primitive.name, numbers

    return list(of(jax.make_jaxpr(fn)(*arguments).jaxpr))


def inputs(gone, dtype=jnp.float32):
    x = np.random.default_rng(0).normal(1.0, 2.0, (2, 3, 3, FULL))
    x[..., gone] = 0
    return jnp.asarray(x, dtype), jnp.asarray(np.delete(x, gone, -1), dtype)


def norm_pair(make, gone):
    """A norm with random parameters, and what is left of it."""
    full = plans.drawn(make)
    paths = [
        name for name in ("scale", "bias") if getattr(full, name, None) is not None
    ]
    return full, rebuild(full, plans.plan_for(full, {p: {0: gone} for p in paths}))


def layer_norm(**options):
    return lambda rngs: nnx.LayerNorm(FULL, rngs=rngs, **options)


def rms_norm(**options):
    return lambda rngs: nnx.RMSNorm(FULL, rngs=rngs, **options)


def group_norm(**options):
    return lambda rngs: nnx.GroupNorm(FULL, num_groups=3, rngs=rngs, **options)


OVER_FEATURES = [
    layer_norm(),
    layer_norm(use_scale=False),
    layer_norm(use_bias=False, epsilon=0.1),
    layer_norm(use_scale=False, use_bias=False),
    layer_norm(reduction_axes=(1, -1)),
    layer_norm(dtype=jnp.bfloat16),
    layer_norm(param_dtype=jnp.bfloat16),
    rms_norm(),
    rms_norm(use_scale=False),
    rms_norm(use_fast_variance=False, reduction_axes=(1, 2, 3)),
    rms_norm(dtype=jnp.float16),
    layer_norm(reduction_axes=(1, 2)),
]


def assert_same(found, expected):
    """Equal but for the rounding of sums that have lost zeros."""
    assert found.dtype == expected.dtype
    ulp = 8 * float(jnp.finfo(found.dtype).eps)
    found, expected = (x.astype(jnp.float32) for x in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=ulp, atol=ulp)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("make", OVER_FEATURES)
def test_what_is_left_is_normalised_as_it_was(make, dtype):
    full, small = norm_pair(make, GONE)
    x, small_x = inputs(GONE, dtype=dtype)
    assert_same(small(small_x), full(x)[..., np.array(LEFT)])
    assert operations(full, x) == operations(small, small_x)


@pytest.mark.parametrize(
    ("make", "gone", "groups", "size", "kind"),
    [
        (group_norm(), [1, 5, 9], 3, 3, norms.CompactGroupNorm),
        (
            group_norm(use_scale=False),
            [0, 3, 4, 7, 9, 10],
            3,
            2,
            norms.CompactGroupNorm,
        ),
        (group_norm(use_bias=False), [4, 5, 6, 7], 2, 4, nnx.GroupNorm),
        (group_norm(), [4, 5, 6, 7, 0, 8], 2, 3, norms.CompactGroupNorm),
        (group_norm(dtype=jnp.bfloat16), [1, 5, 9], 3, 3, norms.CompactGroupNorm),
        (group_norm(reduction_axes=(1, 2, 3)), [1, 5, 9], 3, 3, norms.CompactGroupNorm),
        (group_norm(), list(range(FULL)), 0, 4, nnx.GroupNorm),
        (group_norm(), [], 3, 4, nnx.GroupNorm),
    ],
)
def test_groups_are_normalised_as_they_were(make, gone, groups, size, kind):
    full, small = norm_pair(make, gone)
    assert type(small) is kind
    assert (small.num_groups, small.group_size) == (groups, size)
    x, small_x = inputs(gone)
    assert_same(small(small_x), full(x)[..., np.setdiff1d(np.arange(FULL), gone)])
    if groups:  # on arrays without elements JAX traces less
        assert operations(full, x) == operations(small, small_x)


def test_norms_compacted_twice_divide_by_the_first_counts():
    x, _ = inputs([0, 1, 4, 5, 8, 9])
    for make in (layer_norm(), rms_norm(), group_norm()):
        full = plans.drawn(make)
        small = full
        for gone in ([1, 5, 9], [0, 3, 6]):
            removed = {"scale": {0: gone}}
            if getattr(small, "bias", None) is not None:
                removed["bias"] = {0: gone}
            small = rebuild(small, plans.plan_for(small, removed))
        left = np.array([2, 3, 6, 7, 10, 11])
        assert_same(small(x[..., left]), full(x)[..., left])


def test_a_mask_that_is_the_same_for_all_features_is_respected():
    mask = jnp.asarray(np.random.default_rng(1).random((2, 3, 3, 1)) < 0.7)
    x, small_x = inputs(GONE)
    for make in (
        layer_norm(reduction_axes=(1, 2, 3)),
        rms_norm(reduction_axes=(2, -1)),
    ):
        full, small = norm_pair(make, GONE)
        # A set of masked rows that is empty has no mean, in the full model as well.
        expected = full(x, mask=mask)[..., np.array(LEFT)]
        assert_same(small(small_x, mask=mask), expected)
        assert np.isfinite(expected).all()


def test_masks_that_name_features_are_refused():
    _, small_x = inputs(GONE)
    mask = jnp.ones(small_x.shape, bool)
    for make, asked in (
        (layer_norm(), "size 1 along axis 3"),
        (rms_norm(), "size 1 along axis 3"),
        (group_norm(), "every channel"),
    ):
        _, small = norm_pair(make, [1, 5, 9])
        with pytest.raises(CompactionError, match=asked):
            small(small_x, mask=mask)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (layer_norm(use_fast_variance=False), "use_fast_variance=True"),
        (group_norm(use_fast_variance=False), "use_fast_variance=True"),
        (layer_norm(axis_name="data"), "mapped axis 'data'"),
        (rms_norm(axis_name="data"), "mapped axis 'data'"),
        (
            layer_norm(feature_axes=(1, 2), reduction_axes=(1, 2)),
            "several feature axes",
        ),
    ],
)
def test_what_would_not_be_exact_is_refused(make, reason):
    with pytest.raises(CompactionError, match=reason):
        norm_pair(make, [1, 5, 9])


def test_groups_that_differ_in_size_are_refused():
    with pytest.raises(
        CompactionError, match=r"equally many channels, got \[3, 2, 4\]"
    ):
        norm_pair(group_norm(), GONE)


def test_a_group_norm_over_some_axes_is_refused():
    _, small = norm_pair(group_norm(reduction_axes=(2, 3)), [1, 5, 9])
    with pytest.raises(CompactionError, match="all axes but the first"):
        small(inputs([1, 5, 9])[1])


def test_a_subclass_with_a_mind_of_its_own_is_refused():
    class Shifted(nnx.LayerNorm):
        def __call__(self, x, *, mask=None):
            return super().__call__(x, mask=mask) + 1

    with pytest.raises(CompactionError, match="Shifted .*register_compact"):
        norm_pair(lambda rngs: Shifted(FULL, rngs=rngs), GONE)


def plain(features=FULL, cls=nnx.LayerNorm, **options):
    return lambda rngs: cls(
        features, use_scale=False, use_bias=False, rngs=rngs, **options
    )


def test_a_norm_without_parameters_that_cannot_be_exact_stays_what_it_is():
    class Other(nnx.LayerNorm):
        pass

    for make in (plain(use_fast_variance=False), plain(cls=Other)):
        full, small = norm_pair(make, [])
        assert type(small) is type(full)


def test_a_norm_without_parameters_may_have_said_too_few_features():
    full, small = norm_pair(plain(features=1), [])
    x, _ = inputs([])
    assert_same(small(x), full(x))


def test_a_norm_that_averages_over_other_axes_stays_what_it_is():
    make = layer_norm(reduction_axes=(-3, -2), use_fast_variance=False)
    full, small = norm_pair(make, GONE)
    x, small_x = inputs(GONE)
    assert type(small) is nnx.LayerNorm and small.num_features == len(LEFT)
    assert_same(small(small_x), full(x)[..., np.array(LEFT)])


@pytest.mark.parametrize(
    "norm",
    [
        norms.CompactLayerNorm(9, FULL, rngs=nnx.Rngs(0)),
        norms.CompactRMSNorm(9, FULL, use_scale=False, rngs=nnx.Rngs(0)),
        norms.CompactGroupNorm(9, 4, num_groups=3, rngs=nnx.Rngs(0)),
    ],
)
def test_compact_norms_are_modules_like_others(norm):
    _, x = inputs(GONE)
    expected = norm(x)
    graphdef, state = nnx.split(norm)
    assert_same(nnx.merge(graphdef, state)(x), expected)
    assert_same(jax.jit(lambda norm, x: norm(x))(nnx.clone(norm), x), expected)
    assert graphdef == nnx.split(nnx.clone(norm))[0]
