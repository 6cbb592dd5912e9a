"""What loses every masked channel, exactly; and weights that are computed from others.

A case is a function of the 16 hidden values of which half are masked.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compaction_probes import (
    ALIVE,
    CHANNELS,
    DEAD,
    WEIGHTS,
    X,
    compacted,
    hidden_left,
    probe,
)
from jax import lax


def relu(h):
    return jax.nn.relu(h)


def rms_norm(h):
    return h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-5)


def masked_layer_norm(h):
    mean = h.mean(-1, keepdims=True)
    variance = jnp.mean(h * h, -1, keepdims=True) - mean * mean
    scale = np.isin(np.arange(CHANNELS), ALIVE).astype(np.float32)
    return (h - mean) * lax.rsqrt(variance + 1e-5) * scale[None]


def euclidean_norm(h):
    return h / (1e-3 + jnp.linalg.norm(h, axis=-1, keepdims=True))


def times_the_mean(h):
    return h * h.mean(-1, keepdims=True) + h**3


def constant_multipliers(h):
    return h * jnp.asarray(np.arange(1, 64, 4, dtype=np.float32))[None]


def iota(h):
    return h * (1 + lax.broadcasted_iota(np.float32, h.shape, 1))


def selected_positions(h):
    return jnp.where(jnp.arange(CHANNELS)[None] % 3 == 0, h, 2 * h)


def constant_shift(h):
    return jnp.sin(h + jnp.arange(16.0)[None])


def sigmoid(h):
    return jax.nn.sigmoid(h)


def guarded_logarithm(h):
    return jnp.where(h > 0, jnp.log(h), 0.0)


def clipped(h):
    return jnp.clip(h, 0.1, 1.5)


def rounded(h):
    return jnp.round(3 * h) + h.astype(jnp.bfloat16).astype(h.dtype)


def counted_loop(h):
    return lax.fori_loop(0, 3, lambda i, y: jnp.tanh(1.5 * y), h)


def rolled(h):
    return jnp.roll(h, 3, 1)


def reversed_channels(h):
    return h[:, ::-1]


def strided_slices(h):
    return jnp.concatenate([h[:, ::2], h[:, 1::2]], 1)


def padded(h):
    return jnp.pad(h, ((0, 0), (2, 1)))


def einsum(h):
    matrix = np.outer(WEIGHTS, WEIGHTS[:6])
    return jnp.einsum("bc,cd->bd", h, jnp.asarray(matrix))


def beside_functions_of_it(h):
    return jnp.concatenate([h, jnp.tanh(h), h**2], 1)


def repeated(h):
    return jnp.repeat(jnp.tile(h, (1, 2)), 3, 1)


def interleaved(h):
    return jnp.stack([h, jnp.sin(h)], -1).reshape(h.shape[0], -1)


def standardised_over_the_batch(h):
    return (h - h.mean(0)[None]) * lax.rsqrt(h.var(0) + 1e-5)[None]


def transposed(h):
    return jnp.moveaxis(h.T.reshape(CHANNELS, 1, -1), 0, -1)[0]


REMOVED = [
    relu,
    rms_norm,
    masked_layer_norm,
    euclidean_norm,
    times_the_mean,
    constant_multipliers,
    iota,
    selected_positions,
    constant_shift,
    sigmoid,
    guarded_logarithm,
    clipped,
    rounded,
    counted_loop,
    rolled,
    reversed_channels,
    strided_slices,
    padded,
    einsum,
    beside_functions_of_it,
    repeated,
    interleaved,
    standardised_over_the_batch,
    transposed,
]


@pytest.mark.parametrize("middle", REMOVED, ids=lambda f: f.__name__)
def test_every_masked_channel_goes(middle):
    small, report = compacted(*probe(middle))
    assert hidden_left(small) == len(ALIVE)
    assert sum(report.removed.values()) >= len(DEAD)


def test_pixel_shuffle():
    """Of 16 = 4 channels times 2x2 positions, whole channels go."""
    fn, params = probe(
        lambda h: (
            h.reshape(-1, 1, 1, 2, 2, 4).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 16)
        )
    )
    dead = np.arange(CHANNELS) % 4 < 2
    rng = np.random.default_rng(2)
    params["fc1"] = {
        "kernel": np.where(dead, 0, rng.normal(size=(5, 16))).astype(np.float32),
        "bias": np.where(dead, 0, rng.normal(size=16)).astype(np.float32),
    }
    small, _ = compacted(fn, params)
    assert hidden_left(small) == 8


def test_fused_attention_that_loses_all_heads():
    """The part of an axis that stands for queries, keys and values stays what it is."""
    embed, qkv, out, head = _weights((5, 6), (6, 24), (8, 6), (6, 3))

    def fn(p, x):
        y = jnp.stack([x, jnp.sin(x)], 1) @ p["embed"]
        q, k, v = jnp.moveaxis((y @ p["qkv"]).reshape(-1, 2, 3, 2, 4), 2, 0)
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k), -1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(-1, 2, 8)
        return (y + mixed @ p["out"]).mean(1) @ p["head"]

    zeros = {"qkv": np.zeros_like(qkv), "out": np.zeros_like(out)}
    small, _ = compacted(fn, {"embed": embed, "head": head, **zeros}, on_unknown="pin")
    assert small["out"].shape == (0, 6)


# Weights that are computed, shared or used in two ways: (function, masked parameters,
# how many hidden channels are left)


def _weights(*shapes):
    rng = np.random.default_rng(3)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def _without(weight, axis, channels=DEAD):
    weight[(slice(None),) * axis + (channels,)] = 0
    return weight


def tied():
    """One kernel in and, transposed, out: neither inputs nor outputs go."""
    (w,) = _weights((5, 16))
    return lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, {"w": _without(w, 1)}, 8


def squared():
    """One square kernel twice: its outputs are its inputs."""
    w, out, first = _weights((16, 16), (16, 3), (5, 16))
    fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p["in"] @ p["w"]) @ p["w"]) @ p["out"]
    first = _without(first, 1)
    return fn, {"in": first, "w": _without(w, 1), "out": out}, 8


def symmetric():
    """w + w.T is dead only where both its row and its column are."""
    w, out, first = _weights((16, 16), (16, 3), (5, 16))
    fn = lambda p, x: jnp.tanh(x @ p["in"] @ (p["w"] + p["w"].T)) @ p["out"]
    first = _without(first, 1)
    return fn, {"in": first, "w": _without(_without(w, 1), 0), "out": out}, 8


def normalised():
    w, g, out = _weights((5, 16), (16,), (16, 3))
    unit = lambda v: v * lax.rsqrt((v * v).sum(0, keepdims=True) + 1e-6)
    fn = lambda p, x: jnp.tanh(x @ (unit(p["w"]) * p["g"][None])) @ p["out"]
    return fn, {"w": _without(w, 1), "g": g, "out": out}, 8


def low_rank():
    """a @ b is dead where a column of b is; a dead rank is another matter."""
    a, b, w, out = _weights((5, 4), (4, 16), (5, 16), (16, 3))
    fn = lambda p, x: jnp.tanh(x @ (p["w"] + p["a"] @ p["b"])) @ p["out"]
    params = {"a": a, "b": _without(b, 1), "w": _without(w, 1), "out": out}
    return fn, params, 8


def masked_by_a_constant():
    """What the closed-over mask leaves is dead, whatever the parameter says."""
    w, out = _weights((5, 16), (16, 3))
    mask = _without(np.ones((5, 16), np.float32), 1)
    return (
        lambda p, x: jnp.tanh(x @ (p["w"] * mask)) @ p["out"],
        {
            "w": w,
            "out": out,
        },
        8,
    )


def quantised():
    w, scale, out = _weights((5, 16), (16,), (16, 3))
    w = np.round(9 * _without(w, 1)).astype(np.int8)
    fn = lambda p, x: (
        jnp.tanh(x @ (p["w"].astype(x.dtype) * p["scale"][None])) @ p["out"]
    )
    return fn, {"w": w, "scale": scale, "out": out}, 8


def flat():
    """A kernel that is stored as one row of numbers."""
    w, out = _weights((5, 16), (16, 3))
    fn = lambda p, x: jnp.tanh(x @ p["w"].reshape(5, 16)) @ p["out"]
    return fn, {"w": _without(w, 1).reshape(-1), "out": out}, None


def standardised():
    """The mean over the inputs moves a dead input away from zero: it lives."""
    w, first, out = _weights((16, 9), (5, 16), (9, 3))
    fn = lambda p, x: (
        jnp.tanh(jax.nn.sigmoid(x @ p["in"]) @ (p["w"] - p["w"].mean(0)[None]))
        @ p["out"]
    )
    return fn, {"in": first, "w": _without(w, 0), "out": out}, 16


def read_by_a_second_head():
    """Dead for one head, but not for the other."""
    first, one, other = _weights((5, 16), (16, 3), (16, 3))

    def fn(p, x):
        h = jnp.tanh(x @ p["in"])
        return h @ p["one"] + jnp.sin(h @ p["other"])

    return fn, {"in": first, "one": _without(one, 0), "other": other}, 16


def dead_in_both_heads():
    """Live, and nobody reads it."""
    first, one, other = _weights((5, 16), (16, 3), (16, 3))

    def fn(p, x):
        h = jnp.exp(x @ p["in"] / 3)
        return h @ p["one"] + jnp.sin(h @ p["other"])

    return fn, {"in": first, "one": _without(one, 0), "other": _without(other, 0)}, 8


def summed_over_channels():
    """A head that sums: the readers of a channel have no weights."""
    first, out = _weights((5, 16), (16, 2))

    def fn(p, x):
        h = jnp.tanh(x @ p["in"])
        total = h.sum(1, keepdims=True)
        return jnp.concatenate([h @ p["out"], total], 1)

    return fn, {"in": first, "out": _without(out, 0)}, 16


def one_stack_two_layers():
    """A channel that is dead in one layer of a scan and alive in another stays."""
    first, stack, out = _weights((5, 16), (3, 16, 16), (16, 3))
    stack[0][:, DEAD] = 0

    def fn(p, x):
        step = lambda h, w: (h + jnp.tanh(h @ w), None)
        return lax.scan(step, x @ p["in"], p["stack"])[0] @ p["out"]

    return fn, {"in": _without(first, 1), "stack": stack, "out": out}, 16


def rows_of_a_table():
    """Tokens are looked up by number: no row of the table may go."""
    table, out = _weights((9, 16), (16, 3))
    table[[1, 4]] = 0

    def fn(p, x):
        token = jnp.clip(jnp.abs(2 * x[:, 0]).astype(np.int32), 0, 8)
        return jnp.tanh(p["in"][token]) @ p["out"] + x[:, :3]

    return fn, {"in": _without(table, 1), "out": out}, 8


SHARED = [
    tied,
    squared,
    symmetric,
    normalised,
    low_rank,
    masked_by_a_constant,
    quantised,
    flat,
    standardised,
    read_by_a_second_head,
    dead_in_both_heads,
    summed_over_channels,
    one_stack_two_layers,
    rows_of_a_table,
]


@pytest.mark.parametrize("case", SHARED, ids=lambda f: f.__name__)
def test_weights_that_are_computed_or_shared(case):
    fn, params, left = case()
    small, _ = compacted(fn, params, X, on_unknown="pin")
    if left is not None:
        first = next(name for name in ("in", "w") if name in small)
        assert small[first].shape[1] == left
