import functools

import jax.numpy as jnp
import plans
import pytest
from flax import nnx
from rebuilds import Block, Scanned, assert_close, inputs, layer, rebuilt, without

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
