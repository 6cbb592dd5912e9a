import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.masks.layout import Layout, named_leaves, path_name, select_leaves

STACKED = Layout(batch=(0,))
QUERY = Layout(outputs=(-2, -1), inputs=(-3,))
OUT = Layout(outputs=(-1,), inputs=(-3, -2))


def weight(*shape):
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


class Net(nnx.Module):
    """Every kind of weight that Flax has."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(
            2, 12, 8, 10, use_bias=False, decode=False, rngs=rngs
        )
        self.blocks = nnx.List([nnx.Linear(4, 6, rngs=rngs) for _ in range(2)])
        self.conv = nnx.Conv(4, 8, (3, 5), rngs=rngs)
        self.depthwise = nnx.Conv(4, 8, (3, 3), feature_group_count=4, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.embed = nnx.Embed(11, 4, rngs=rngs)
        self.lstm = nnx.OptimizedLSTMCell(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)


@functools.cache
def net():
    """Return the shapes of the network's variables, boxed."""
    return nnx.state(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))


NET_WEIGHTS = {  # path -> (neurons, fan-in)
    "attention/key/kernel": (8, 12),
    "attention/out/kernel": (10, 8),
    "attention/query/kernel": (8, 12),
    "attention/value/kernel": (8, 12),
    "blocks/0/kernel": (6, 4),
    "blocks/1/kernel": (6, 4),
    "conv/kernel": (8, 60),
    "depthwise/kernel": (8, 9),
    "lstm/dense_h/kernel": (24, 6),
    "lstm/dense_i/kernel": (24, 4),
}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "x"))
        x = nn.Dense(6, kernel_init=kernel_init)(x)
        return nn.MultiHeadDotProductAttention(2, name="attention")(x, x), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: None},
        )
        x, _ = stack(name="blocks")(x, None)
        x = x + nn.Embed(5, 6, name="tokens")(jnp.zeros((2, 3), jnp.int32))
        return nn.RNN(nn.LSTMCell(4, name="lstm"))(x)


@functools.cache
def scanned():
    """Return the shapes of a scanned Linen stack, boxed."""
    return jax.eval_shape(Scanned().init, jax.random.key(0), jnp.ones((2, 3, 6)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    """A module in the manner of Equinox: attributes, outputs first."""

    weight: jax.Array
    bias: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Mlp:
    layers: tuple[Linear, ...]
    scale: jax.Array


def mlp():
    layers = (Linear(weight(6, 4), weight(6)), Linear(weight(2, 6), None))
    return Mlp(layers, weight(2, 2))


# The networks of Flax


def test_the_weights_of_an_nnx_network():
    leaves = select_leaves(net())
    shapes = {p: x.layout.matrix_shape(x.shape) for p, x in leaves.items()}
    assert shapes == NET_WEIGHTS
    assert list(leaves) == list(NET_WEIGHTS)
    assert all(leaf.path == path for path, leaf in leaves.items())
    assert all(leaf.sparsity is None for leaf in leaves.values())
    assert leaves["conv/kernel"].shape == (3, 5, 4, 8)


def test_the_weights_of_a_scanned_linen_stack():
    leaves = select_leaves(
        scanned(), layout={r"blocks/.*Dense_0/kernel": Layout(batch=(0,))}
    )
    shapes = {p: x.layout.matrix_shape(x.shape) for p, x in leaves.items()}
    attention, lstm = "params/blocks/attention", "params/lstm"
    assert shapes == {
        "params/blocks/Dense_0/kernel": (3, 6, 6),
        **{f"{attention}/{n}/kernel": (3, 6, 6) for n in ("key", "query", "value")},
        f"{attention}/out/kernel": (3, 6, 6),
        **{f"{lstm}/h{gate}/kernel": (4, 4) for gate in "fgio"},
        **{f"{lstm}/i{gate}/kernel": (4, 6) for gate in "fgio"},
    }
    assert leaves[f"{attention}/out/kernel"].layout == Layout((-1,), (-3, -2), (0,))
    query = leaves[f"{attention}/query/kernel"]
    assert query.shape == (3, 6, 2, 3)
    assert query.layout.layer_shape(query.shape) == (6, 6)


def test_attention_is_known_by_its_siblings():
    kernel = {"kernel": weight(4, 2, 3)}
    layout = lambda tree, path: select_leaves(tree)[path].layout
    assert layout({"query": kernel, "out": kernel}, "query/kernel") == QUERY
    assert layout({"query": kernel, "out": kernel}, "out/kernel") == OUT
    assert layout({"a": {"query": kernel, "out": kernel}}, "a/out/kernel") == OUT
    assert layout({"query": kernel, "key": kernel}, "query/kernel") == Layout()
    assert layout({"out": kernel}, "out/kernel") == Layout()
    assert layout({"a": {"query": kernel}, "out": kernel}, "out/kernel") == Layout()
    both = {"query": kernel, "out": kernel, "gate": kernel}
    assert layout(both, "gate/kernel") == Layout()
    flat = {name: {"kernel": weight(4, 6)} for name in ("query", "out")}
    assert layout(flat, "query/kernel") == Layout()


# Paths


def test_boxed_and_bare_trees_have_the_same_names():
    names = list(named_leaves(net()))
    assert set(NET_WEIGHTS) < set(names)
    assert not any(name.endswith("value") for name in names)
    assert list(named_leaves(nnx.as_pure(net()))) == names
    assert list(named_leaves(nnx.to_pure_dict(net()))) == names
    boxed, bare = scanned(), nn.unbox(scanned())
    assert jax.tree.structure(boxed) != jax.tree.structure(bare)
    assert list(named_leaves(boxed)) == list(named_leaves(bare))
    assert "params/blocks/Dense_0/kernel" in named_leaves(boxed)


def test_names_of_attributes_items_and_keys():
    names = ["layers/0/weight", "layers/0/bias", "layers/1/weight", "scale"]
    assert list(named_leaves(mlp())) == names
    tree = {"value": [1, {"value": 2}], "other": (3,)}
    assert list(named_leaves(tree)) == ["other/0", "value/0", "value/1/value"]
    assert path_name(()) == ""


# Which leaves are sparse


def params():
    leaf = lambda *shape, dtype=np.float32: np.ones(shape, dtype)
    return {
        "codes": leaf(3, 4, dtype=np.int32),
        "conv": {"bias": leaf(8), "kernel": leaf(3, 3, 4, 8)},
        "empty": {"kernel": leaf(0, 4)},
        "fc": {"bias": leaf(1, 2), "kernel": leaf(4, 2, dtype=np.float16)},
        "key": jax.random.key(0),
        "norm": {"scale": leaf(1, 8)},
        "patch_embedding": {"kernel": leaf(4, 4)},
        "phase": leaf(4, 4, dtype=np.complex64),
        "pos_embed": leaf(4, 4, dtype=jnp.bfloat16),
        "tokens": {"Embedding": leaf(9, 4)},
    }


def chosen(**arguments):
    return {p: x.sparsity for p, x in select_leaves(params(), **arguments).items()}


def test_the_default_takes_weights_and_no_embeddings():
    expected = ["conv/kernel", "fc/kernel", "patch_embedding/kernel"]
    assert list(chosen()) == expected
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, mlp()))
    assert list(select_leaves(shapes)) == ["layers/0/weight", "layers/1/weight"]


def test_a_predicate_decides_alone():
    seen = {}

    def where(path, leaf):
        seen[path] = leaf.shape
        return path in ("conv/bias", "pos_embed", "fc/kernel")

    assert chosen(where=where) == {
        "conv/bias": None,
        "fc/kernel": None,
        "pos_embed": None,
    }
    floats = [p for p in named_leaves(params()) if p not in ("codes", "key", "phase")]
    assert list(seen) == floats
    assert seen["conv/kernel"] == (3, 3, 4, 8)


def test_patterns_give_weights_their_own_sparsity():
    assert chosen(where={"^fc": 0.5}) == {
        "conv/kernel": None,
        "fc/kernel": 0.5,
        "patch_embedding/kernel": None,
    }
    assert chosen(where={"fc|conv": 0, "tokens": 0.9}) == {
        "patch_embedding/kernel": None,
        "tokens/Embedding": 0.9,
    }


def test_the_first_pattern_that_matches_counts():
    everything = {path: 0.5 for path in [*chosen(), "pos_embed", "tokens/Embedding"]}
    assert chosen(where={"": 0.5, "fc": 0}) == everything
    assert chosen(where={"fc": 0.1, "kernel": 0.2, "embed": 0, "conv": 0.3}) == {
        "conv/kernel": 0.2,
        "fc/kernel": 0.1,
        "patch_embedding/kernel": 0.2,
    }


def test_the_first_layout_that_matches_counts():
    layout = {"layers/1": STACKED, "weight": Layout((0,), (1,)), "layers": Layout()}
    tree = {"layers": [{"weight": weight(4, 6)}, {"weight": weight(2, 6, 4)}]}
    leaves = select_leaves(tree, layout=layout)
    assert leaves["layers/0/weight"].layout.matrix_shape((4, 6)) == (4, 6)
    assert leaves["layers/1/weight"].layout.matrix_shape((2, 6, 4)) == (2, 4, 6)


def test_a_layout_overrides_what_the_path_tells():
    tree = {name: {"kernel": weight(4, 2, 3)} for name in ("query", "out")}
    leaves = select_leaves(tree, layout={"query": Layout()})
    assert [leaves[f"{n}/kernel"].layout for n in tree] == [Layout(), OUT]


# Bad input


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"where= takes regular expressions; '\(' is none", {"where": {"(": 0.5}}),
        (
            r"layout= takes regular expressions; '\(' is none",
            {"layout": {"(": STACKED}},
        ),
        (
            "where=: the pattern 'dense' must match a weight and matches none. The "
            r"paths are: conv/kernel, .*tokens/Embedding\. Correct or remove it",
            {"where": {"fc": 0.5, "dense": 0.5}},
        ),
        ("where=: the pattern 'bias' .* matches none", {"where": {"bias": 0.5}}),
        ("where=: the pattern 'codes' .* matches none", {"where": {"codes": 0}}),
        ("layout=: the pattern 'dense' .* none", {"layout": {"dense": STACKED}}),
        (
            "Nothing is to be sparse: the predicate where= is true for no "
            "floating-point leaf. The leaves are: codes, conv/bias",
            {"where": lambda path, _: path == "codes"},
        ),
        (
            "Nothing is to be sparse: where= leaves no weight of two or more "
            "dimensions. The leaves are: codes, conv/bias",
            {"where": {"": 0}},
        ),
        (
            r"layout= for conv/kernel: Layout\(.*array of 4 dimensions",
            {"layout": {"conv/kernel": Layout(outputs=(4,))}},
        ),
    ],
)
def test_requests_that_cannot_be_met_are_refused(message, arguments):
    with pytest.raises(ValueError, match=message):
        select_leaves(params(), **arguments)


def test_a_tree_without_weights_is_refused():
    for tree in ({"bias": weight(3)}, {"embed": weight(3, 3)}, {}):
        with pytest.raises(ValueError, match="Nothing is to be sparse"):
            select_leaves(tree)


@pytest.mark.parametrize("dtype", [np.float64, jnp.float8_e4m3fn], ids=str)
def test_a_sparse_leaf_of_another_dtype_is_refused(dtype):
    tree = {"fc": {"kernel": np.ones((2, 2), dtype)}, "other": weight(2, 2)}
    name = jnp.dtype(dtype).name
    with pytest.raises(TypeError, match=f"fc/kernel: .*float16, got {name}; cast it"):
        select_leaves(tree)
    assert list(select_leaves(tree, where={"fc": 0})) == ["other"]


def test_a_long_list_of_paths_is_cut_short():
    tree = {f"layer{i:02}": weight(2, 2) for i in range(15)}
    with pytest.raises(ValueError, match=r"layer10, layer11, \.\.\. \(3 more\)\. Corr"):
        select_leaves(tree, where={"dense": 0.5})


def test_a_scalar_cannot_be_sparse():
    tree = {"fc": weight(2, 2), "temperature": np.float32(1)}
    with pytest.raises(ValueError, match="temperature.*0 dimensions"):
        select_leaves(tree, where=lambda path, leaf: True)


def test_two_leaves_of_one_name_are_refused():
    tree = {"a": {"b": weight(2, 2)}, "a/b": weight(3, 3)}
    with pytest.raises(ValueError, match="a/b"):
        select_leaves(tree)
