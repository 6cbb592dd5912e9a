import flax
import jax
import jax.numpy as jnp
import numpy as np
import plans
import pytest
from flax import linen as nn

from sparsejax.compaction import CompactionError, channel_groups, compact_fn
from sparsejax.compaction.linen import linen_apply
from sparsejax.compaction.rebuild import take
from sparsejax.masks.layout import named_leaves


def inputs(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def compacted(module, removed, *arguments, **rest):
    """The masked variables, what is left of them, and the plan."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *arguments)
    full = plans.masked(plans.randomised(shapes), removed)
    plan = plans.plan_for(full, removed, **rest)
    left = [take(leaf, plan.keep[path]) for path, leaf in named_leaves(full).items()]
    return full, jax.tree.structure(full).unflatten(left), plan


def check(module, removed, *arguments, gone=(), **rest):
    """The small variables give what the full ones give, but for what is gone."""
    full, small, plan = compacted(module, removed, *arguments, **rest)
    expected = jax.jit(module.apply)(full, *arguments)
    found = jax.jit(linen_apply(module, full, plan))(small, *arguments)
    assert found.dtype == expected.dtype
    expected = np.delete(expected, list(gone), -1)
    np.testing.assert_allclose(found, expected, rtol=5e-6, atol=5e-6)
    return full, small


class Cnn(nn.Module):
    norm: nn.Module

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.relu(self.norm(x))
        x = nn.Conv(8, (3, 3), feature_group_count=4)(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        x = nn.ConvTranspose(6, (2, 2), strides=(2, 2), transpose_kernel=True)(x)
        x = nn.DenseGeneral((2, 4))(x.mean((1, 2)))
        x = nn.Einsum((2, 4, 5), "nab,abc->nc")(x)
        return nn.Dense(3)(x)


def cnn_removed(gone, groups=()):
    """Without some channels of the first layer, and others further on."""
    removed = {
        "params/Conv_0/kernel": {3: gone},
        "params/Conv_0/bias": {0: gone},
        "params/norm/scale": {0: gone},
        "params/norm/bias": {0: gone},
        "params/Conv_1/kernel": {3: gone},
        "params/Conv_1/bias": {0: gone},
        "params/ConvTranspose_0/kernel": {3: gone, 2: [1]},
        "params/ConvTranspose_0/bias": {0: [1]},
        "params/DenseGeneral_0/kernel": {0: [1], 2: [0, 2]},
        "params/DenseGeneral_0/bias": {1: [0, 2]},
        "params/Einsum_0/kernel": {1: [0, 2], 2: [3]},
        "params/Einsum_0/bias": {0: [3]},
        "params/Dense_0/kernel": {0: [3]},
    }
    for name in ("scale", "bias"):
        removed[f"params/BatchNorm_0/{name}"] = {0: gone}
    for name in ("mean", "var"):
        removed[f"batch_stats/BatchNorm_0/{name}"] = {0: gone}
    return removed


@pytest.mark.parametrize(
    ("norm", "gone"),
    [
        (nn.GroupNorm(4), [2, 3, 6, 7]),  # whole groups
        (nn.GroupNorm(2), [2, 3, 6, 7]),  # half of every group
        (nn.GroupNorm(num_groups=None, group_size=4), [0, 1, 4, 5]),
        (nn.LayerNorm(), [0, 1]),
        (nn.LayerNorm(dtype=jnp.float32, reduction_axes=(1, 2, 3)), [0, 1]),
        (nn.InstanceNorm(), [4, 5]),
    ],
)
def test_convolutions_and_norms_compute_the_same(norm, gone):
    check(Cnn(norm), cnn_removed(gone), inputs(2, 4, 4, 3))


class Block(nn.Module):
    """A layer of a transformer, for ``nn.scan``."""

    attention_fn: object = nn.dot_product_attention

    @nn.compact
    def __call__(self, x, _):
        y = nn.RMSNorm()(x)
        y = nn.MultiHeadDotProductAttention(
            4, qkv_features=16, attention_fn=self.attention_fn
        )(y)
        x = x + y
        y = nn.Dense(8)(nn.LayerNorm(use_bias=False)(x))
        return x + nn.Dense(6)(nn.relu(y)), None


class Transformer(nn.Module):
    block: type = Block

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(7, 6)
        stack = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(self.block, length=3, **stack)()(embed(ids), None)
        return embed.attend(x)


def transformer_removed(stream, heads, depth):
    """Without some channels of the stream, some heads, and some of their depth."""
    block = "params/ScanBlock_0"
    attention = f"{block}/MultiHeadDotProductAttention_0"
    removed = {
        "params/Embed_0/embedding": {1: stream},
        f"{block}/RMSNorm_0/scale": {1: stream},
        f"{block}/LayerNorm_0/scale": {1: stream},
        f"{block}/Dense_0/kernel": {1: stream, 2: [7]},
        f"{block}/Dense_0/bias": {1: [7]},
        f"{block}/Dense_1/kernel": {1: [7], 2: stream},
        f"{block}/Dense_1/bias": {1: stream},
        f"{attention}/out/kernel": {1: heads, 2: [0] if depth else [], 3: stream},
        f"{attention}/out/bias": {1: stream},
    }
    gone = {"query": depth, "key": depth, "value": [0] if depth else []}
    for name, which in gone.items():
        removed[f"{attention}/{name}/kernel"] = {1: stream, 2: heads, 3: which}
        removed[f"{attention}/{name}/bias"] = {1: heads, 2: which}
    return removed


@pytest.mark.parametrize(
    ("heads", "depth"), [([1, 2], []), ([], [3]), ([0], [1, 2]), ([0, 1, 2, 3], [])]
)
def test_transformers_under_scan_compute_the_same(heads, depth):
    removed = transformer_removed([2, 4], heads, depth)
    check(Transformer(), removed, jnp.array([[0, 3, 6, 2]]))


def test_boxed_variables_compute_the_same():
    boxed = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    module = nn.Sequential([nn.Dense(8, kernel_init=boxed), nn.relu, nn.Dense(3)])
    removed = {
        "params/layers_0/kernel": {1: [1, 2]},
        "params/layers_0/bias": {0: [1, 2]},
        "params/layers_2/kernel": {0: [1, 2]},
    }
    check(module, removed, inputs(2, 4))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, momentum=0.5)(nn.Dense(6)(x))
        return nn.Dense(2)(x)


def test_training_sees_what_is_left():
    gone, module, x = [0, 4], Normed(), inputs(5, 3)
    removed = {
        "params/Dense_0/kernel": {1: gone},
        "params/Dense_0/bias": {0: gone},
        "params/BatchNorm_0/scale": {0: gone},
        "params/BatchNorm_0/bias": {0: gone},
        "batch_stats/BatchNorm_0/mean": {0: gone},
        "batch_stats/BatchNorm_0/var": {0: gone},
        "params/Dense_1/kernel": {0: gone},
    }
    full, small, plan = compacted(module, removed, x)

    def trained(apply, variables):
        def loss(params):
            given = {**variables, "params": params}
            y, state = apply(given, x, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), state

        gradient, state = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
        return named_leaves({"params": gradient, **state})

    expected = trained(module.apply, full)
    found = trained(linen_apply(module, full), small)
    assert set(found) == set(expected) == set(removed) | {"params/Dense_1/bias"}
    for path, leaf in found.items():
        left = take(expected[path], plan.keep[path])
        np.testing.assert_allclose(leaf, left, rtol=1e-4, atol=1e-5)


def test_the_module_stays_as_it_is():
    dense = nn.Dense(8)
    module = nn.Sequential([dense, nn.relu])
    removed = {"params/layers_0/kernel": {1: [1]}, "params/layers_0/bias": {0: [1]}}
    full, small = check(module, removed, inputs(2, 4), gone=[1])
    assert dense.features == 8 and module.layers[0] == dense
    assert module.apply(full, inputs(2, 4)).shape == (2, 8)
    with pytest.raises(flax.errors.ScopeParamShapeError):
        module.apply(small, inputs(2, 4))


@pytest.mark.parametrize(
    ("norm", "mask", "reason"),
    [
        (nn.LayerNorm(use_fast_variance=False), None, "use_fast_variance=True"),
        (nn.RMSNorm(axis_name="data"), None, "mapped axis 'data'"),
        (
            nn.LayerNorm(force_float32_reductions=False),
            None,
            "force_float32_reductions",
        ),
        (nn.GroupNorm(2), None, "pass plan=report"),
        (nn.GroupNorm(2), jnp.ones((2, 8), bool), "called with a mask"),
        (nn.LayerNorm(), jnp.ones((2, 6), bool), "same for all features"),
    ],
)
def test_norms_that_would_not_be_exact_are_refused(norm, mask, reason):
    gone = {0: [1, 5]}
    names = ["scale", "bias"] if not isinstance(norm, nn.RMSNorm) else ["scale"]
    removed = {f"params/{name}": gone for name in names}
    shape = jax.ShapeDtypeStruct((8,), jnp.float32)
    full = plans.randomised({"params": dict.fromkeys(names, shape)})
    plan = plans.plan_for(full, removed)
    left = {n: take(x, plan.keep[f"params/{n}"]) for n, x in full["params"].items()}
    apply = linen_apply(norm, full, None if "plan=" in reason else plan)
    with pytest.raises(CompactionError, match=reason):
        apply({"params": left}, inputs(2, 6), mask=mask)


def test_a_norm_without_parameters_is_refused():
    module = nn.LayerNorm(use_scale=False, use_bias=False)
    with pytest.raises(CompactionError, match='cannot be known; use backend="replay"'):
        linen_apply(module, {})({}, inputs(2, 6))


def test_variables_of_another_model_are_refused():
    small = {"params": {"scale": jnp.ones(6), "bias": jnp.ones(6)}}
    with pytest.raises(CompactionError, match="must have params/scale; its paths are:"):
        linen_apply(nn.LayerNorm(), {"a": jnp.ones(3)})(small, inputs(2, 6))


def test_what_compact_fn_finds_the_module_computes():
    module, x = Cnn(nn.GroupNorm(4)), inputs(2, 4, 4, 3)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    full = plans.randomised(shapes)
    report = channel_groups(module.apply, x, params=full)
    full = report.zero(full, {"params/Conv_0": [0, 2], "params/Einsum_0": [1]})
    small_fn, small, report = compact_fn(module.apply, full, x)
    assert report.removed == {"params/Conv_0": 2, "params/Einsum_0": 1}
    found = jax.jit(linen_apply(module, shapes, report))(small, x)
    np.testing.assert_allclose(found, small_fn(small, x), rtol=1e-5)
