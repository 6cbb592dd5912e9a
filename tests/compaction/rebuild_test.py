import jax
import jax.numpy as jnp
import numpy as np
import plans
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax.compaction import CompactionError, Plan
from sparsejax.compaction.rebuild import foldable, rebuild, take
from sparsejax.masks.layout import named_leaves


class Net(nnx.Module):
    """Convolution, norm, grouped convolution, dropout, and a head used twice."""

    def __init__(self, rngs):
        tagged = {"note": "first"}
        self.conv = nnx.Conv(3, 8, (3, 3), kernel_metadata=tagged, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.grouped = nnx.Conv(8, 8, (1, 1), feature_group_count=8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.head = nnx.Linear(8, 8, use_bias=False, rngs=rngs)
        self.again = self.head
        self.tied = nnx.Linear(8, 8, rngs=rngs)
        self.tied.kernel = self.head.kernel

    def __call__(self, x):
        x = nnx.relu(self.grouped(self.drop(self.norm(self.conv(x)))))
        return self.again(self.head(x)) + self.tied(x)


GONE = [1, 6]
REMOVED = {
    "conv/kernel": {3: GONE},
    "conv/bias": {0: GONE},
    **{f"norm/{name}": {0: GONE} for name in ("scale", "bias", "mean", "var")},
    "grouped/kernel": {3: GONE},
    "grouped/bias": {0: GONE},
    "again/kernel": {0: GONE, 1: GONE},
    "tied/bias": {0: GONE},
}
GROUPS = {"grouped/kernel": 6}


def masked_and_plan():
    full = plans.masked(plans.drawn(Net), REMOVED)
    return full, plans.plan_for(full, REMOVED, feature_groups=GROUPS)


def images(n=2):
    draw = np.random.default_rng(1).normal(size=(n, 5, 5, 3))
    return jnp.asarray(draw, jnp.float32)


def shapes(model):
    leaves = named_leaves(nnx.state(model))
    return {path: (leaf.shape, str(leaf.dtype)) for path, leaf in leaves.items()}


def test_the_small_model_computes_the_same():
    full, plan = masked_and_plan()
    small = rebuild(full, plan)
    expected = np.delete(full(images()), GONE, -1)
    found = small(images())
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    graphdef, state = nnx.split(small)
    for same in (nnx.merge(graphdef, state), nnx.clone(small)):
        compiled = jax.jit(lambda model, x: model(x))(same, images())
        np.testing.assert_allclose(compiled, found, rtol=1e-5)


def test_the_full_model_stays_as_it_is():
    full, plan = masked_and_plan()
    before, graphdef = shapes(full), nnx.split(full)[0]
    values = {
        k: np.array(v) for k, v in named_leaves(nnx.state(full, nnx.Param)).items()
    }
    small = rebuild(full, plan)
    small.conv.kernel[...] = jnp.zeros_like(small.conv.kernel[...])
    small.head.bias = nnx.Param(jnp.ones(6))
    assert shapes(full) == before and nnx.split(full)[0] == graphdef
    for path, leaf in named_leaves(nnx.state(full, nnx.Param)).items():
        np.testing.assert_array_equal(leaf, values[path])


def test_types_metadata_and_sharing_stay():
    full, plan = masked_and_plan()
    small = rebuild(full, plan)
    assert type(small) is Net
    assert small.conv.kernel.get_metadata()["note"] == "first"
    assert isinstance(small.norm.mean, nnx.BatchStat)
    assert small.again is small.head and small.tied.kernel is small.head.kernel
    assert small.head.in_features == small.tied.in_features == 6
    assert small.grouped.feature_group_count == small.grouped.in_features == 6
    assert jax.random.key_data(small.drop.rngs.key[...]).shape == (2,)


def test_gradients_of_the_small_model_are_those_of_what_is_left():
    full, plan = masked_and_plan()
    small = rebuild(full, plan)
    loss = lambda model, x: jnp.sum(jnp.sin(model(x)))
    of_full = named_leaves(nnx.grad(loss)(full, images()))
    of_small = named_leaves(nnx.grad(loss)(small, images()))
    assert set(of_full) == set(of_small)
    for path, gradient in of_small.items():
        expected = take(of_full[path], plan.keep[path])
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def test_shapes_alone_are_enough():
    full, plan = masked_and_plan()
    abstract = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    small = rebuild(abstract, plan)
    assert shapes(small) == shapes(rebuild(full, plan))
    assert isinstance(small.conv.kernel.get_value(), jax.ShapeDtypeStruct)
    assert abstract.conv.kernel.shape == (3, 3, 3, 8)


def test_a_layer_may_lose_everything():
    class Dead(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.norm = nnx.LayerNorm(4, rngs=rngs)
            self.head = nnx.Conv(4, 2, (3, 3), rngs=rngs)

        def __call__(self, x):
            return self.head(self.norm(self.conv(x)))

    every = [0, 1, 2, 3]
    removed = {
        "conv/kernel": {3: every},
        "conv/bias": {0: every},
        "norm/scale": {0: every},
        "norm/bias": {0: every},
        "head/kernel": {2: every},
    }
    full = plans.masked(plans.drawn(Dead), removed)
    small = rebuild(full, plans.plan_for(full, removed))
    assert small.conv.kernel.shape == (3, 3, 3, 0)
    np.testing.assert_allclose(small(images()), full(images()), rtol=1e-6)
    assert small.head.kernel.size == 0


def test_a_plan_that_removes_nothing_changes_nothing():
    full, _ = masked_and_plan()
    small = rebuild(full, Plan({}))
    assert shapes(small) == shapes(full) and nnx.split(small)[0] == nnx.split(full)[0]


FOLDED = {
    "Linear": (lambda bias, rngs: nnx.Linear(3, 4, use_bias=bias, rngs=rngs), (4,)),
    "Conv": (lambda bias, rngs: nnx.Conv(3, 4, (3,), use_bias=bias, rngs=rngs), (4,)),
    "ConvTranspose": (
        lambda bias, rngs: nnx.ConvTranspose(
            3, 4, (3,), transpose_kernel=True, use_bias=bias, rngs=rngs
        ),
        (4,),
    ),
    "LinearGeneral": (
        lambda bias, rngs: nnx.LinearGeneral(3, (2, 2), use_bias=bias, rngs=rngs),
        (2, 2),
    ),
}


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(("make", "shape"), FOLDED.values(), ids=FOLDED)
def test_constants_go_into_the_bias(make, shape, use_bias):
    model = plans.drawn(lambda rngs: nnx.Dict(layer=make(use_bias, rngs)))
    constant = np.arange(4.0).reshape(shape)
    plan = Plan({}, folds={"layer/kernel": constant})
    small = rebuild(model, plan).layer
    x = jnp.ones((2, 5, 3))
    np.testing.assert_allclose(
        small(x), np.asarray(model.layer(x)) + constant, rtol=1e-6
    )
    assert isinstance(small.bias, nnx.Param) and small.use_bias
    abstract = rebuild(
        nnx.eval_shape(lambda: nnx.Dict(layer=make(use_bias, nnx.Rngs(0)))), plan
    )
    assert shapes(abstract.layer) == shapes(small)
    assert (model.layer.bias is None) == (not use_bias)


def test_constants_go_into_every_layer_of_a_stack():
    make = lambda rngs: nnx.vmap(
        lambda rngs: nnx.Linear(3, 4, use_bias=False, rngs=rngs)
    )(rngs.split(2))
    model = plans.drawn(lambda rngs: nnx.Dict(stack=make(rngs)))
    constant = np.arange(8.0).reshape(2, 4)
    small = rebuild(model, Plan({}, folds={"stack/kernel": constant})).stack
    np.testing.assert_array_equal(small.bias[...], constant)
    assert small.bias.dtype == small.kernel.dtype


def test_constants_are_not_written_into_arrays_of_the_full_model():
    model = nnx.Dict(layer=nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    bias = np.ones(4, np.float32)
    model.layer.bias.set_value(bias)
    plan = Plan({}, folds={"layer/kernel": np.arange(4.0)})
    small = rebuild(model, plan)
    np.testing.assert_array_equal(small.layer.bias[...], 1 + np.arange(4))
    np.testing.assert_array_equal(bias, 1)


@pytest.mark.parametrize(
    ("make", "folds", "reason"),
    [
        (
            lambda rngs: nnx.Einsum("ab,bc->ac", (3, 4), (4,), rngs=rngs),
            {"layer/kernel": np.ones(4)},
            r"^layer: .* of a Einsum",
        ),
        (
            lambda rngs: nnx.Linear(3, 4, rngs=rngs),
            {"layer/kernel": np.ones(3)},
            r"^layer: a constant of shape \(3,\) .* kernel of shape \(3, 4\)",
        ),
        (
            lambda rngs: nnx.Embed(3, 4, rngs=rngs),
            {"layer/embedding": np.ones(4)},
            "layer/embedding cannot be folded",
        ),
    ],
)
def test_constants_that_no_bias_can_take_are_refused(make, folds, reason):
    model = plans.drawn(lambda rngs: nnx.Dict(layer=make(rngs)))
    with pytest.raises(CompactionError, match=reason):
        rebuild(model, Plan({}, folds=folds))


def test_kernels_that_may_take_constants_are_told():
    can = foldable(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    kernels = ("conv/kernel", "grouped/kernel", "again/kernel")
    assert all(map(can, kernels)) and not can("norm/scale")
    assert not foldable(
        nnx.eval_shape(
            lambda: nnx.Dict(e=nnx.Einsum("ab,bc->ac", (3, 4), rngs=nnx.Rngs(0)))
        )
    )("e/kernel")


@pytest.mark.parametrize(
    ("keep", "reason"),
    [
        (
            {"fc/kernel": (None, None)},
            "has a parameter fc/kernel and this model has not",
        ),
        ({"conv/bias": (None, None)}, r"conv/bias has the shape \(8,\)"),
        ({"conv/bias": (np.array([0, 8]),)}, r"\(8,\), .* indices up to \[8\]"),
    ],
)
def test_a_plan_of_another_model_is_refused(keep, reason):
    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    with pytest.raises(CompactionError, match=f"another model.*{reason}"):
        rebuild(model, Plan(keep))


KEEP = (np.array([0, 3]), None)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.bool])
def test_what_is_left_has_the_dtype_it_had(dtype):
    full = np.arange(12).reshape(4, 3).astype(dtype)
    for leaf in (full, jnp.asarray(full)):
        left = take(leaf, KEEP)
        assert type(left) is type(leaf) and left.dtype == dtype
        np.testing.assert_array_equal(left, full[[0, 3]])
    struct = take(jax.ShapeDtypeStruct((4, 3), dtype), KEEP)
    assert struct == jax.ShapeDtypeStruct((2, 3), dtype)


@pytest.mark.parametrize(
    ("spec", "left"),
    [
        (PartitionSpec("a"), PartitionSpec("a", None)),
        (PartitionSpec(("a", "b")), PartitionSpec(None, None)),
        (PartitionSpec("b", "a"), PartitionSpec(None, "a")),
        (PartitionSpec(None, ("a", "b")), PartitionSpec(None, ("a", "b"))),
    ],
)
def test_shardings_stay_where_the_devices_divide_what_is_left(spec, left):
    mesh = jax.make_mesh(
        (2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    sharding = NamedSharding(mesh, spec)
    full = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    keep = (np.array([0, 1, 3, 4, 6, 7]), None)
    found = take(jax.device_put(full, sharding), keep)
    np.testing.assert_array_equal(found, full[keep[0]])
    struct = take(jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding), keep)
    expected = NamedSharding(mesh, left)
    assert found.sharding.is_equivalent_to(expected, 2)
    assert struct.sharding.is_equivalent_to(expected, 2)


def test_arrays_that_are_bound_to_no_device_stay_so():
    device = jax.devices()[3]
    free, bound = jnp.ones((4, 3)), jax.device_put(jnp.ones((4, 3)), device)
    assert not take(free, KEEP).committed
    assert take(bound, KEEP).committed and take(bound, KEEP).devices() == {device}
