import functools

import jax
import jax.numpy as jnp
import numpy as np
import plans
import pytest
from flax import nnx

from sparsejax import compaction
from sparsejax.compaction import CompactionError, register_compact
from sparsejax.compaction.exact_attention import AtFullDepth, at_full_depth
from sparsejax.compaction.layers import equal_sizes
from sparsejax.compaction.rebuild import rebuild


def rebuilt(make, removed, **rest):
    """The masked model with random parameters, and the small one."""
    full = plans.masked(plans.drawn(make), removed)
    return full, rebuild(full, plans.plan_for(full, removed, **rest))


def inputs(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def without(x, gone, axis=-1):
    return jnp.asarray(np.delete(np.asarray(x), gone, axis))


def assert_close(found, expected):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def layer(cls, *arguments, **options):
    return lambda rngs: cls(*arguments, rngs=rngs, **options)


conv = functools.partial(layer, nnx.Conv, kernel_size=(3,))
up = functools.partial(layer, nnx.ConvTranspose, 6, 4, (3,), strides=2)


@pytest.mark.parametrize(
    ("make", "removed", "gone_in", "gone_out", "sizes"),
    [
        (
            layer(nnx.Linear, 6, 4),
            {"kernel": {0: [1, 5], 1: [2]}, "bias": {0: [2]}},
            *([1, 5], [2]),
            {"in_features": 4, "out_features": 3},
        ),
        (
            layer(nnx.LoRALinear, 6, 4, lora_rank=2, use_bias=False),
            {
                "kernel": {0: [1], 1: [2, 3]},
                "lora/lora_a": {0: [1]},
                "lora/lora_b": {1: [2, 3]},
            },
            *([1], [2, 3]),
            {"in_features": 5, "out_features": 2},
        ),
        (
            layer(nnx.LinearGeneral, 6, (2, 4)),
            {"kernel": {0: [0], 2: [1, 3]}, "bias": {1: [1, 3]}},
            *([0], [1, 3]),
            {"in_features": (5,), "out_features": (2, 2)},
        ),
        (
            layer(nnx.LinearGeneral, (5, 6), 4, axis=(-2, -1), batch_axis={0: 2}),
            {"kernel": {2: [0, 1]}},
            *([0, 1], []),
            {"in_features": (5, 4), "out_features": (4,)},
        ),
        (
            layer(nnx.Einsum, "nla,abc->nlbc", (6, 3, 4), (3, 4)),
            {"kernel": {0: [2], 2: [0]}, "bias": {1: [0]}},
            *([2], [0]),
            {"kernel_shape": (5, 3, 3), "bias_shape": (3, 3)},
        ),
        (
            conv(6, 4),
            {"kernel": {1: [0], 2: [1, 2]}, "bias": {0: [1, 2]}},
            *([0], [1, 2]),
            {"in_features": 5, "out_features": 2, "kernel_shape": (3, 5, 2)},
        ),
        (
            conv(6, 4, mask=jnp.ones((3, 6, 4)).at[0].set(0)),
            {name: {1: [0], 2: [1, 2]} for name in ("kernel", "mask")}
            | {"bias": {0: [1, 2]}},
            *([0], [1, 2]),
            {"in_features": 5, "out_features": 2, "kernel_shape": (3, 5, 2)},
        ),
        (  # the same position of every group
            conv(6, 4, feature_group_count=2),
            {"kernel": {1: [0], 2: [1, 3]}, "bias": {0: [1, 3]}},
            *([0, 3], [1, 3]),
            {"in_features": 4, "out_features": 2, "feature_group_count": 2},
        ),
        (
            up(),
            {"kernel": {1: [5], 2: [0]}, "bias": {0: [0]}},
            *([5], [0]),
            {"in_features": 5, "out_features": 3, "kernel_shape": (3, 5, 3)},
        ),
        (
            up(transpose_kernel=True),
            {"kernel": {2: [5], 1: [0]}, "bias": {0: [0]}},
            *([5], [0]),
            {"in_features": 5, "out_features": 3, "kernel_shape": (3, 3, 5)},
        ),
        (
            layer(nnx.InstanceNorm, 6),
            {"scale": {0: [1]}, "bias": {0: [1]}},
            *([1], [1]),
            {"num_features": 5},
        ),
        (
            layer(nnx.BatchNorm, 6, use_scale=False, use_bias=False),
            {"mean": {0: [1]}, "var": {0: [1]}},
            *([1], [1]),
            {"num_features": 5},
        ),
    ],
)
def test_a_smaller_layer_is_the_layer_without_channels(
    make, removed, gone_in, gone_out, sizes
):
    full, small = rebuilt(make, removed)
    x = inputs(2, 5, 6)
    assert_close(small(without(x, gone_in)), without(full(x), gone_out))
    assert {name: getattr(small, name) for name in sizes} == sizes
    assert type(small) is type(full)


def test_batch_statistics_move_as_they_did():
    names = ("scale", "bias", "mean", "var")
    full, small = rebuilt(layer(nnx.BatchNorm, 6), {n: {0: [1, 2]} for n in names})
    x = inputs(8, 6)
    full.train()
    small.train()
    assert_close(small(without(x, [1, 2])), without(full(x), [1, 2]))
    assert_close(small.mean[...], without(full.mean[...], [1, 2]))
    assert_close(small.var[...], without(full.var[...], [1, 2]))


def test_whole_groups_of_a_convolution_go():
    removed = {"kernel": {2: [2, 3]}, "bias": {0: [2, 3]}}
    full, small = rebuilt(
        conv(6, 6, feature_group_count=3), removed, feature_groups={"kernel": 2}
    )
    x = inputs(2, 5, 6)
    assert (small.feature_group_count, small.in_features, small.out_features) == (
        2,
        4,
        4,
    )
    assert_close(small(without(x, [2, 3])), without(full(x), [2, 3]))


def test_an_embedding_and_its_transpose_shrink_together():
    full, small = rebuilt(layer(nnx.Embed, 7, 6), {"embedding": {1: [0, 2]}})
    ids = jnp.array([[1, 6, 0]])
    assert (small.num_embeddings, small.features) == (7, 4)
    assert_close(small(ids), without(full(ids), [0, 2]))
    x = inputs(2, 6)
    assert_close(small.attend(without(x, [0, 2])), full.attend(x))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.up = nnx.Linear(6, 8, rngs=rngs)
        self.down = nnx.LinearGeneral((8,), (6,), axis=(-1,), rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(self.norm(x))))


class Scanned(nnx.Module):
    def __init__(self, make, rngs):
        self.blocks = nnx.vmap(make)(rngs.split(3))

    def __call__(self, x):
        step = lambda x, block: (block(x), None)
        axes = (nnx.Carry, 0)
        return nnx.scan(step, in_axes=axes, out_axes=axes)(x, self.blocks)[0]


def test_stacked_layers_under_scan_are_treated_as_single_ones():
    removed = {
        "blocks/norm/scale": {1: [0]},
        "blocks/norm/bias": {1: [0]},
        "blocks/up/kernel": {1: [0], 2: [3, 4]},
        "blocks/up/bias": {1: [3, 4]},
        "blocks/down/kernel": {1: [3, 4], 2: [0]},
        "blocks/down/bias": {1: [0]},
    }
    full, small = rebuilt(lambda rngs: Scanned(Block, rngs), removed)
    x = inputs(2, 6).at[:, 0].set(0)
    assert_close(small(without(x, [0])), without(full(x), [0]))
    assert small.blocks.norm.full_features == 6
    assert (small.blocks.up.in_features, small.blocks.up.out_features) == (5, 6)
    assert small.blocks.down.in_features == (6,)


@pytest.mark.parametrize(
    ("cell", "gates"),
    [
        (nnx.SimpleCell, 1),
        (nnx.GRUCell, 3),
        (nnx.OptimizedLSTMCell, 4),
        (nnx.LSTMCell, 4),
    ],
)
def test_recurrent_cells_carry_less(cell, gates):
    gone, removed = [1, 4], {}
    every = [gate * 6 + i for gate in range(gates) for i in gone]
    for path, leaf in plans.leaves_of(layer(cell, 3, 6)).items():
        which = every if leaf.shape[-1] == gates * 6 else gone
        removed[path] = {leaf.ndim - 1: which}
        if leaf.shape[0] == 6 and leaf.ndim == 2:
            removed[path][0] = gone
    full, small = rebuilt(layer(cell, 3, 6), removed)
    run = lambda cell: nnx.RNN(cell, rngs=nnx.Rngs(0))(inputs(2, 5, 3))
    assert_close(run(small), without(run(full), gone))
    assert (small.in_features, small.hidden_features) == (3, 4)


attention = functools.partial(
    layer, nnx.MultiHeadAttention, 4, 6, 32, in_kv_features=5, decode=False
)


def heads_removed(gone, kv_gone=None):
    kv_gone = gone if kv_gone is None else kv_gone
    removed = {"out/kernel": {0: gone}}
    for name, which in {"query": gone, "key": kv_gone, "value": kv_gone}.items():
        removed |= {f"{name}/kernel": {1: which}, f"{name}/bias": {0: which}}
    return removed


def depth_removed(query_gone, value_gone):
    removed = {"out/kernel": {1: value_gone}}
    for name, gone in {
        "query": query_gone,
        "key": query_gone,
        "value": value_gone,
    }.items():
        removed |= {f"{name}/kernel": {2: gone}, f"{name}/bias": {1: gone}}
    return removed


def of_inputs(removed):
    """Also without some input and output features."""
    more = {"query/kernel": {0: [5]}, "key/kernel": {0: [0]}, "value/kernel": {0: [0]}}
    more |= {"out/kernel": {2: [1]}, "out/bias": {0: [1]}}
    return {path: removed.get(path, {}) | more.get(path, {}) for path in removed | more}


def attended(module, is_small, **options):
    x, y = inputs(2, 7, 6), inputs(2, 3, 5)
    if is_small:
        return module(without(x, [5]), without(y, [0]), **options)
    return without(module(x, y, **options), [1])


@pytest.mark.parametrize(
    ("make", "removed", "left"),
    [
        (attention(), heads_removed([1, 2]), (2, 2, 8)),
        (attention(num_kv_heads=2), heads_removed([2, 3], [1]), (2, 1, 8)),
        (attention(num_kv_heads=2), heads_removed([1, 2], []), (2, 2, 8)),
        (attention(), depth_removed([0, 3], [5, 7]), (4, 4, 6)),
        (attention(dtype=jnp.bfloat16), depth_removed([0, 3], [5, 7]), (4, 4, 6)),
        (attention(), depth_removed([*range(8)], [*range(8)]), (4, 4, 0)),
        (attention(), heads_removed([0, 1, 2, 3]), (0, 0, 8)),
    ],
)
def test_smaller_attention_attends_as_it_did(make, removed, left):
    full, small = rebuilt(make, of_inputs(removed))
    found, expected = attended(small, True), attended(full, False)
    assert found.dtype == expected.dtype
    tolerance = 2e-2 if found.dtype == jnp.bfloat16 else 2e-6
    found, expected = (x.astype(jnp.float32) for x in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    assert (small.num_heads, small.num_kv_heads, small.head_dim) == left
    sizes = (small.in_features, small.in_kv_features, small.out_features)
    assert (*sizes, small.qkv_features) == (5, 4, 5, left[0] * left[2])


def by_distance(query, key, value, *, mask=None, **_):
    """Attention to what is near: of the size of heads it uses something else."""
    squares = jnp.square(query[:, :, None] - key[:, None]).mean(-1)
    return jnp.einsum("nqkh,nkhd->nqhd", jax.nn.softmax(-squares, 2), value)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (attention(attention_fn=by_distance), {}),
        (attention(dropout_rate=0.5), {"deterministic": True}),
        (attention(dropout_rate=0.5), {"deterministic": False}),
        (attention(), {"mask": jnp.tri(7, 3, dtype=bool)[None, None]}),
        (attention(), {"is_causal": True}),
    ],
)
def test_attention_of_every_kind_keeps_its_scale(make, options):
    full, small = rebuilt(make, of_inputs(depth_removed([0, 3], [5, 7])))
    random = lambda: nnx.Rngs(dropout=3)
    expected = attended(full, False, rngs=random(), **options)
    assert_close(attended(small, True, rngs=random(), **options), expected)


def test_attention_with_normalised_queries_keeps_both_constants():
    removed = depth_removed([0, 3], [5, 7])
    removed |= {"query_ln/scale": {0: [0, 3]}, "key_ln/scale": {0: [0, 3]}}
    full, small = rebuilt(attention(normalize_qk=True), of_inputs(removed))
    assert_close(attended(small, True), attended(full, False))
    assert small.query_ln.full_features == 8


def test_attention_compacted_twice_keeps_the_first_scale():
    full = plans.masked(plans.drawn(attention()), depth_removed([0, 3], [5, 7]))
    once = rebuild(full, plans.plan_for(full, depth_removed([0], [5])))
    # What was 3 is 2 now, and 7 is 6.
    twice = rebuild(once, plans.plan_for(once, depth_removed([2], [6])))
    x, y = inputs(2, 7, 6), inputs(2, 3, 5)
    assert_close(twice(x, y), full(x, y))
    assert twice.attention_fn == AtFullDepth(nnx.dot_product_attention, 8)


def test_attention_at_full_depth_is_a_static_attribute():
    _, small = rebuilt(attention(), depth_removed([0], [5]))
    x, y = inputs(2, 7, 6), inputs(2, 3, 5)
    traces = []

    @jax.jit
    def apply(module, x, y):
        traces.append(module)
        return module(x, y)

    graphdef, state = nnx.split(small)
    for module in (small, nnx.clone(small), nnx.merge(graphdef, state)):
        assert_close(apply(module, x, y), small(x, y))
    assert len(traces) == 1
    assert at_full_depth(small.attention_fn, 3) == small.attention_fn


@pytest.mark.parametrize(
    ("removed", "reason"),
    [
        (depth_removed([0], []), "7 dimensions are left of query and key and 8 of"),
        (heads_removed([0], []), "3 heads that are left must be a multiple of the 4"),
        (heads_removed([], [0, 1, 2, 3]), "multiple of the 0 heads"),
    ],
)
def test_attention_that_cannot_be_built_is_refused(removed, reason):
    make = lambda rngs: nnx.Dict(attend=attention()(rngs))
    removed = {f"attend/{path}": axes for path, axes in removed.items()}
    with pytest.raises(CompactionError, match=f"^attend: .*{reason}"):
        rebuilt(make, removed)


def test_sizes_of_heads_that_must_stay_equal_are_listed():
    def make(rngs):
        layers = [attention()(rngs), nnx.Linear(2, 2, rngs=rngs)]
        return nnx.Dict(layers=nnx.List(layers), stack=Scanned(attention(), rngs))

    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    names = [("query", 2), ("key", 2), ("value", 2), ("out", 1)]
    assert equal_sizes(model) == [
        tuple((f"layers/0/{name}/kernel", axis) for name, axis in names),
        tuple((f"stack/blocks/{name}/kernel", axis + 1) for name, axis in names),
    ]


class Heads(nnx.Module):
    """Stores widths of its own, twice."""

    def __init__(self, heads, depth, *, rngs):
        self.heads, self.depth = heads, depth
        self.both = nnx.Linear(6, 2 * heads * depth, rngs=rngs)

    def __call__(self, x):
        x = self.both(x).reshape(*x.shape[:-1], 2, self.heads, self.depth)
        return jnp.prod(x, axis=-3).reshape(*x.shape[:-3], -1)


def one_head_fewer(cls):
    gone = [4, 5, 6, 7, 16, 17, 18, 19]  # head 1 of 3, of both halves
    removed = {"both/kernel": {1: gone}, "both/bias": {0: gone}}
    left = {("both/kernel", 1): (2, 2, 4)}
    return rebuilt(layer(cls, 3, 4), removed, factors=left)


def test_modules_that_are_not_known_stay_as_they_are():
    _, small = one_head_fewer(Heads)
    assert (small.heads, small.both.out_features) == (3, 16)


def test_a_registered_module_is_fixed_with_what_is_left():
    class Registered(Heads):
        pass

    class Child(Registered):
        pass

    seen = {}

    def fix(module, sliced):
        assert module is sliced.module and module.both.out_features == 16
        _, module.heads, module.depth = sliced.factors("both/kernel", -1)
        seen["full"] = sliced.full_shape("both/bias")
        seen["kept"] = sliced.kept("both/bias", 0).tolist()
        seen["all"] = sliced.kept("both/kernel", 0).tolist()
        seen["no factors"] = sliced.factors("both/kernel", 0)

    register_compact(Registered, fix)
    full, small = one_head_fewer(Child)
    x = inputs(2, 6)
    assert_close(small(x), without(full(x), [4, 5, 6, 7]))
    assert seen == {
        "full": (24,),
        "kept": [0, 1, 2, 3, *range(8, 16), *range(20, 24)],
        "all": [0, 1, 2, 3, 4, 5],
        "no factors": None,
    }


def test_a_module_with_a_method_for_it_fixes_itself():
    class Own(Heads):
        def __compact__(self):
            self.heads = self.both.out_features // (2 * self.depth)

    full, small = one_head_fewer(Own)
    x = inputs(2, 6)
    assert_close(small(x), without(full(x), [4, 5, 6, 7]))
    assert full.heads == 3


@pytest.mark.parametrize("given", [("Heads", len), (Heads, "fix")])
def test_only_classes_and_functions_are_registered(given):
    with pytest.raises(TypeError, match="a class and a function"):
        register_compact(*given)


class Fused(nnx.Module):
    """Attention as it is often written: one projection, reshaped by stored sizes."""

    def __init__(self, heads, depth, *, rngs):
        self.heads, self.depth = heads, depth
        self.qkv = nnx.Linear(6, 3 * heads * depth, rngs=rngs)
        self.out = nnx.Linear(heads * depth, 6, rngs=rngs)

    def __call__(self, x):
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, self.depth)
        query, key, value = jnp.moveaxis(qkv, 2, 0)
        y = jax.nn.dot_product_attention(query, key, value)
        return self.out(y.reshape(batch, length, -1))


def test_the_factors_of_a_real_plan_fix_a_fused_projection():
    full, x = plans.drawn(layer(Fused, 3, 4)), inputs(2, 5, 6)
    report = compaction.channel_groups(full, x)
    (heads,) = (g.name for g in report.groups if g.size == 3 and g.pinned is None)
    full = report.zero(full, {heads: [1]})
    with pytest.raises(CompactionError, match="register_compact"):
        compaction.compact(full, x)

    def fix(module, sliced):
        module.heads, module.depth = sliced.factors("out/kernel", 0)

    register_compact(Fused, fix)
    small, report = compaction.compact(full, x)
    assert (small.heads, small.depth, small.qkv.out_features) == (2, 4, 24)
    assert_close(small(x), full(x))
