"""Groups of channels are data: who belongs to them, where, and what pins them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compaction_checks import abstract, groups_of, shapes
from flax import nnx
from jax import lax

from sparsejax import compaction


def conv(x, kernel, padding="SAME"):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=numbers
    )


def zeros(*shape):
    return np.zeros(shape, np.float32)


def batch_norm(x, p):
    mean, var, scale, bias = (
        p[n][None, None, None] for n in ("mean", "var", "scale", "bias")
    )
    return (x - mean) * lax.rsqrt(var + 1e-5) * scale + bias


def belongs(report, path, axis):
    """Return the groups that an axis belongs to, and its members of them."""
    return [
        (group, member)
        for group in report.groups
        for member in group.members
        if (member.path, member.axis) == (path, axis)
    ]


def only(report, path, axis):
    """Return the one group that an axis belongs to, and its member of it."""
    ((group, member),) = belongs(report, path, axis)
    return group, member


def convolutions():
    norm = {name: zeros(8) for name in ("scale", "bias", "mean", "var")}
    params = {
        "conv1": {"kernel": zeros(3, 3, 3, 8)},
        "norm1": norm,
        "conv2": {"kernel": zeros(3, 3, 8, 5), "bias": zeros(5)},
        "head": {"kernel": zeros(5 * 49, 4)},
    }

    def fn(p, x):
        y = jax.nn.relu(batch_norm(conv(x, p["conv1"]["kernel"]), p["norm1"]))
        y = conv(y, p["conv2"]["kernel"]) + p["conv2"]["bias"][None, None, None]
        return y.reshape(-1, 5 * 49) @ p["head"]["kernel"]

    return groups_of(fn, params, zeros(2, 7, 7, 3))


def test_a_convolution_its_norm_and_its_consumer_are_one_group():
    group = convolutions()["conv1"]
    assert group.size == 8 and group.pinned is None
    found = {(m.path, m.axis): m.role for m in group.members}
    assert found == {
        ("conv1/kernel", 3): "producer",
        ("norm1/scale", 0): "norm",
        ("norm1/bias", 0): "norm",
        ("norm1/mean", 0): "statistic",
        ("norm1/var", 0): "statistic",
        ("conv2/kernel", 2): "consumer",
    }
    for member in group.members:
        np.testing.assert_array_equal(member.channels, np.arange(8))


def test_a_flattened_channel_has_an_index_for_each_position():
    report = convolutions()
    group, member = only(report, "head/kernel", 0)
    assert group.name == "conv2" and member.role == "consumer"
    np.testing.assert_array_equal(member.channels, np.tile(np.arange(5), 49))
    assert only(report, "conv2/bias", 0)[0] is group


def test_inputs_and_outputs_are_pinned_and_say_why():
    report = convolutions()
    outputs, _ = only(report, "head/kernel", 1)
    assert outputs.pinned and "output" in outputs.pinned
    assert not outputs.removable.any()
    for group, _ in belongs(report, "conv1/kernel", 2):
        assert group.pinned and not group.removable.any()


def test_the_halves_of_a_gate_are_one_group():
    params = {"up": {"kernel": zeros(6, 10), "bias": zeros(10)}, "down": zeros(5, 3)}

    def fn(p, x):
        value, gate = jnp.split(x @ p["up"]["kernel"] + p["up"]["bias"][None], 2, -1)
        return (value * jax.nn.silu(gate)) @ p["down"]

    report = groups_of(fn, params, zeros(2, 6))
    group, member = only(report, "up/kernel", 1)
    assert group.size == 5
    np.testing.assert_array_equal(member.channels, np.tile(np.arange(5), 2))
    np.testing.assert_array_equal(
        only(report, "up/bias", 0)[1].channels, np.tile(np.arange(5), 2)
    )
    np.testing.assert_array_equal(only(report, "down", 0)[1].channels, np.arange(5))


def test_a_concatenation_is_read_at_offsets():
    params = {"a": zeros(6, 3), "b": zeros(6, 4), "out": zeros(7, 2)}

    def fn(p, x):
        both = jnp.concatenate([jnp.tanh(x @ p["a"]), jnp.sin(x @ p["b"])], -1)
        return both @ p["out"]

    report = groups_of(fn, params, zeros(2, 6))
    (a, _), (b, _) = only(report, "a", 1), only(report, "b", 1)
    assert a is not b
    read = {g.name: m.channels.tolist() for g, m in belongs(report, "out", 0)}
    assert read == {
        a.name: [0, 1, 2, -1, -1, -1, -1],
        b.name: [-1, -1, -1, 0, 1, 2, 3],
    }


def joined(parts):
    """Return a function that puts a token of its own beside the projected ones."""

    def fn(p, x):
        tokens = x @ p["patches"]
        token = jnp.broadcast_to(p["token"], (len(x), 1, 4))
        return parts(token, tokens) @ p["out"]

    return fn


@pytest.mark.parametrize(
    "parts",
    [
        lambda token, tokens: jnp.concatenate([token, tokens], 1),
        lambda token, tokens: lax.dynamic_update_slice(tokens, token, (0, 1, 0)),
        lambda token, tokens: jnp.stack([token[:, 0], tokens[:, 0]]),
    ],
    ids=["concatenate", "update", "stack"],
)
def test_a_token_beside_others_belongs_to_their_channels(parts):
    normal = np.random.default_rng(0).normal
    params = {"patches": normal(size=(6, 4)), "token": normal(size=(1, 1, 4))}
    params["out"] = normal(size=(4, 2))
    params = jax.tree.map(np.float32, params)
    x = np.float32(normal(size=(2, 3, 6)))
    fn = joined(parts)
    report = groups_of(fn, params, x)
    group, member = only(report, "token", 2)
    assert group is only(report, "patches", 1)[0] and member.role == "norm"
    masked = report.zero(params, {group.name: [1]})
    small_fn, small, _ = compaction.compact_fn(fn, masked, x)
    assert small["token"].shape == (1, 1, 3)
    np.testing.assert_allclose(small_fn(small, x), fn(masked, x), atol=1e-5)


def test_a_residual_stream_is_one_group():
    block = {"in": zeros(6, 9), "out": zeros(9, 6)}
    params = {"stem": zeros(4, 6), "blocks": [block, dict(block)], "head": zeros(6, 2)}

    def fn(p, x):
        x = x @ p["stem"]
        for block in p["blocks"]:
            x = x + jnp.tanh(x @ block["in"]) @ block["out"]
        return x @ p["head"]

    report = groups_of(fn, params, zeros(2, 4))
    stream, _ = only(report, "stem", 1)
    assert stream.size == 6
    assert {(m.path, m.axis, m.role) for m in stream.members} == {
        ("stem", 1, "producer"),
        ("blocks/0/in", 0, "consumer"),
        ("blocks/0/out", 1, "producer"),
        ("blocks/1/in", 0, "consumer"),
        ("blocks/1/out", 1, "producer"),
        ("head", 0, "consumer"),
    }
    inner = [only(report, f"blocks/{i}/in", 1)[0] for i in (0, 1)]
    assert inner[0] is not inner[1] and [g.size for g in inner] == [9, 9]


def attend(q, k, v):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.float32(2)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, -1), v)


def test_heads_and_their_dimensions_are_groups_of_their_own():
    params = {n: zeros(6, 3, 4) for n in "qkv"} | {"out": zeros(3, 4, 6)}

    def fn(p, x):
        y = attend(*(jnp.einsum("btc,chd->bthd", x, p[n]) for n in "qkv"))
        return jnp.einsum("bqhd,hdc->bqc", y, p["out"])

    report = groups_of(fn, params, zeros(2, 5, 6))
    heads, _ = only(report, "q", 1)
    assert heads.size == 3
    assert {(m.path, m.axis) for m in heads.members} == {
        ("q", 1),
        ("k", 1),
        ("v", 1),
        ("out", 0),
    }
    keys, values = only(report, "q", 2)[0], only(report, "v", 2)[0]
    assert (keys.size, values.size) == (4, 4)
    assert {(m.path, m.axis) for m in keys.members} == {("q", 2), ("k", 2)}
    assert {(m.path, m.axis) for m in values.members} == {("v", 2), ("out", 1)}


def test_a_fused_projection_has_heads_and_dimensions_along_one_axis():
    params = {"qkv": zeros(6, 3 * 2 * 4), "out": zeros(8, 6)}

    def fn(p, x):
        q, k, v = jnp.moveaxis((x @ p["qkv"]).reshape(-1, 5, 3, 2, 4), 2, 0)
        return attend(q, k, v).reshape(-1, 5, 8) @ p["out"]

    report = groups_of(fn, params, zeros(2, 5, 6))
    found = {
        tuple(m.channels): g.size for g, m in belongs(report, "qkv", 1) if not g.pinned
    }
    head, dim = (axis.ravel() for axis in np.indices((3, 2, 4))[1:])
    assert found.pop(tuple(head)) == 2
    for channels, size in found.items():  # of queries and keys, and values, or of all
        assert size == 4
        np.testing.assert_array_equal(channels, np.where(np.less(channels, 0), -1, dim))
    assert (np.stack([*found]) >= 0).any(0).all()


def test_stacked_layers_have_their_channels_in_common():
    params = {"up": zeros(3, 6, 9), "down": zeros(3, 9, 6), "head": zeros(6, 2)}

    def fn(p, x):
        block = lambda h, w: (h + jnp.tanh(h @ w["up"]) @ w["down"], None)
        stacks = {n: p[n] for n in ("up", "down")}
        return lax.scan(block, jnp.sin(x), stacks)[0] @ p["head"]

    report = groups_of(fn, params, zeros(2, 6))
    hidden, member = only(report, "up", 2)
    assert hidden.size == 9 and hidden.removable.all()
    np.testing.assert_array_equal(member.channels, np.arange(9))
    assert {(m.path, m.axis) for m in hidden.members} == {("up", 2), ("down", 1)}
    assert not [g for g, _ in belongs(report, "up", 0) if not g.pinned]


def test_groups_are_plain_data_with_names_of_their_own():
    report = convolutions()
    names = [group.name for group in report.groups]
    assert len(set(names)) == len(names)
    for group in report.groups:
        assert report[group.name] is group
        assert isinstance(group.size, int) and isinstance(group.members, tuple)
        assert group.pinned is None or isinstance(group.pinned, str)
        for member in group.members:
            assert isinstance(member.channels, np.ndarray)
            assert np.issubdtype(member.channels.dtype, np.integer)
            assert -1 <= member.channels.min() <= member.channels.max() < group.size

    @jax.jit
    def squares(kernel):
        members = {m.path: m for m in report["conv1"].members}
        channels = members["conv1/kernel"].channels
        return jnp.zeros(8).at[channels].add((kernel**2).sum((0, 1, 2)))

    np.testing.assert_array_equal(squares(np.ones((3, 3, 3, 8))), np.full(8, 27))


def test_groups_of_shapes_are_those_of_arrays():
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    params, x = {"a": zeros(4, 6), "b": zeros(6, 2)}, zeros(2, 4)
    one = groups_of(fn, params, x)
    other = groups_of(fn, abstract(params), abstract(x))
    assert str(one).splitlines()[:-1] == str(other).splitlines()[:-1]


def test_the_table_has_every_group_and_why_it_is_pinned():
    report = convolutions()
    lines = str(report).splitlines()
    for group in report.groups:
        (line,) = [line for line in lines if line.split()[:1] == [group.name]]
        assert str(group.size) in line.split()
        assert group.pinned is None or group.pinned in line


class Perceptron(nnx.Module):
    def __init__(self, rngs):
        self.fc1 = nnx.Linear(5, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.fc2 = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.fc2(nnx.relu(self.norm(self.fc1(x))))


def test_zero_masks_whole_channels_of_a_module_and_leaves_it_alone():
    model = Perceptron(nnx.Rngs(0))
    for leaf in (model.fc1.bias, model.norm.bias):
        leaf[...] = leaf[...] + 1
    report = compaction.channel_groups(model, zeros(2, 5))
    masked = report.zero(model, {"fc1": [3, 7]})
    assert isinstance(masked, Perceptron) and masked is not model
    alive = np.isin(np.arange(8), [3, 7], invert=True)
    for path in ("fc1.kernel", "fc1.bias", "norm.scale", "norm.bias"):
        module, leaf = path.split(".")
        before = getattr(getattr(model, module), leaf)[...]
        after = getattr(getattr(masked, module), leaf)[...]
        assert before.all(), path
        np.testing.assert_array_equal(after, np.where(alive, before, 0))
    kernel = model.fc2.kernel[...]
    np.testing.assert_array_equal(
        masked.fc2.kernel[...], np.where(alive[:, None], kernel, 0)
    )
    np.testing.assert_array_equal(masked.fc2.bias[...], model.fc2.bias[...])


def test_zero_leaves_statistics_and_numbers_of_other_groups():
    rng = np.random.default_rng(0)
    report = convolutions()
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    params = {
        "conv1": {"kernel": normal(3, 3, 3, 8)},
        "norm1": {name: normal(8) for name in ("scale", "bias", "mean", "var")},
        "conv2": {"kernel": normal(3, 3, 8, 5), "bias": normal(5)},
        "head": {"kernel": normal(245, 4)},
    }
    masked = report.zero(params, {"conv1": [0], "conv2": [2]})
    assert shapes(masked) == shapes(params)
    for name in ("mean", "var"):
        np.testing.assert_array_equal(masked["norm1"][name], params["norm1"][name])
    assert np.count_nonzero(masked["norm1"]["scale"]) == 7
    assert np.count_nonzero(masked["conv2"]["kernel"]) == 9 * 7 * 4
    assert np.count_nonzero(masked["head"]["kernel"]) == 4 * 49 * 4
    assert params["norm1"]["scale"].all()


@pytest.mark.parametrize(
    ("channels", "error", "message"),
    [
        ({"conv7": [0]}, KeyError, "conv7.*conv1"),
        ({"conv1": [8]}, ValueError, r"conv1.*\[0, 8\).*8"),
        ({"conv1": [-1]}, ValueError, r"conv1.*\[0, 8\).*-1"),
    ],
)
def test_zero_refuses_what_is_not_there(channels, error, message):
    params = {
        "conv1": {"kernel": zeros(3, 3, 3, 8)},
        "norm1": {name: zeros(8) for name in ("scale", "bias", "mean", "var")},
        "conv2": {"kernel": zeros(3, 3, 8, 5), "bias": zeros(5)},
        "head": {"kernel": zeros(245, 4)},
    }
    with pytest.raises(error, match=message):
        convolutions().zero(params, channels)


def test_rounding_keeps_multiples():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    params = {"a": normal(4, 16), "b": normal(16, 2)}
    params["a"][:, :5] = 0
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    for multiple, left in ((1, 11), (4, 12), (8, 16), (16, 16)):
        _, small, _ = compaction.compact_fn(fn, params, zeros(2, 4), round_to=multiple)
        assert (small["a"].shape, small["b"].shape) == ((4, left), (left, 2))
        alive = set(range(5, 16))
        columns = {tuple(c) for c in np.asarray(small["a"]).T}
        assert {tuple(params["a"][:, i]) for i in alive} <= columns
