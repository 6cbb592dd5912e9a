"""What cannot lose its channels is refused, with its place, or can be kept.

A case is a function of the 16 hidden values of which half are masked. In each, an
output depends on how many channels there are, or where.
"""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from compaction_probes import (
    ALIVE,
    CHANNELS,
    WEIGHTS,
    X,
    assert_says_where,
    compacted,
    hidden_left,
    probe,
)
from flax import nnx
from jax import lax
from jax.interpreters import mlir

from sparsejax import compaction


def softmax(h):
    return jax.nn.softmax(h, -1)


def log_softmax(h):
    return jax.nn.log_softmax(h, -1)


def maximum(h):
    return h - h.max(-1, keepdims=True)


def minimum(h):
    return h * h.min(-1, keepdims=True)


def product(h):
    return h * jnp.prod(1 + h / 4, -1, keepdims=True)


def sort(h):
    return jnp.sort(h, -1)


def argsort(h):
    return jnp.argsort(h, -1).astype(h.dtype) / 7


def median(h):
    return h - jnp.median(h, -1, keepdims=True)


def top_k(h):
    return lax.top_k(h, 10)[0]


def fft(h):
    return jnp.fft.fft(h).real


def cumsum(h):
    return jnp.cumsum(h, -1)


def cumulative_product(h):
    return jnp.cumprod(1 + h / 4, -1)


def cumulative_maximum(h):
    return lax.cummax(h, axis=1)


def argmax(h):
    return jax.nn.one_hot(jnp.argmax(h, -1), CHANNELS)


def two_pass_norm(h):
    centred = h - h.mean(-1, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5)


def local_response_norm(h):
    total = lax.reduce_window(h * h, 0.0, lax.add, (1, 5), (1, 1), "SAME")
    return h / (1 + total) + total


def convolution_over_channels(h):
    kernel = jnp.asarray(WEIGHTS[:3])[None, None]
    return lax.conv(h[:, None], kernel, (1,), "SAME")[:, 0]


def traced_slice(h):
    start = (h[0, 0] > 0).astype(np.int32) * 5
    return lax.dynamic_slice_in_dim(h, start, 9, 1)


def traced_gather(h):
    index = jnp.argsort(h[0] * WEIGHTS)
    return h[:, index]


def gather_per_example(h):
    index = (jnp.abs(h[:, :4]) * 7).astype(np.int32) % CHANNELS
    return jnp.take_along_axis(h, index, 1)


def traced_roll(h):
    return jnp.roll(h, (h[0, 0] > 0).astype(np.int32) + 1, 1)


def traced_scatter(h):
    index = (jnp.abs(h[0]) * 7).astype(np.int32) % CHANNELS
    return jnp.zeros_like(h).at[:, index].add(h)


def qr(h):
    square = h[:, :, None] * h[:, None, :] + 3 * jnp.eye(CHANNELS)[None]
    return jnp.linalg.qr(square)[1].sum(2)


def cholesky(h):
    square = h[:, :, None] * h[:, None, :] + 3 * jnp.eye(CHANNELS)[None]
    return jnp.linalg.cholesky(square).sum(1)


def callback(h):
    out = jax.ShapeDtypeStruct(h.shape, h.dtype)
    return jax.pure_callback(lambda v: np.flip(np.asarray(v), 1), out, h)


def random_mask(h):
    return h * jax.random.bernoulli(jax.random.key(0), 0.5, h.shape)


def recurrence_over_channels(h):
    step = lambda carry, row: (jnp.tanh(carry + row),) * 2
    return lax.scan(step, jnp.zeros(h.shape[0]), h.T)[1].T


def channel_attention(h):
    gram = h[:, :, None] * h[:, None, :]
    return jnp.einsum("bij,bj->bi", jax.nn.softmax(gram, -1), h)


mystery_p = jax.extend.core.Primitive("mystery")
mystery_p.def_impl(lambda x: x * x.sum(1, keepdims=True))
mystery_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(
    mystery_p, mlir.lower_fun(mystery_p.impl, multiple_results=False)
)


def unknown_primitive(h):
    return mystery_p.bind(h)


REFUSED = {  # to the primitive at fault; None: any primitive within
    softmax: None,
    log_softmax: None,
    maximum: "reduce_max",
    minimum: "reduce_min",
    product: "reduce_prod",
    sort: "sort",
    argsort: "sort",
    median: None,
    top_k: "top_k",
    fft: "fft",
    cumsum: "cumsum",
    cumulative_product: "cumprod",
    cumulative_maximum: "cummax",
    argmax: "argmax",
    two_pass_norm: None,
    local_response_norm: None,
    convolution_over_channels: "conv_general_dilated",
    traced_slice: "dynamic_slice",
    traced_gather: None,
    gather_per_example: None,
    traced_roll: None,
    traced_scatter: None,
    qr: "qr",
    cholesky: "cholesky",
    callback: "pure_callback",
    random_mask: None,
    recurrence_over_channels: "scan",
    channel_attention: None,
    unknown_primitive: "mystery",
}


@pytest.mark.parametrize("middle", REFUSED, ids=lambda f: f.__name__)
def test_refused_with_its_place_and_kept_when_pinned(middle):
    fn, params = probe(middle)
    with pytest.raises(compaction.CompactionError) as raised:
        compaction.compact_fn(fn, params, X)
    assert_says_where(raised.value, middle, REFUSED[middle])
    small, _ = compacted(fn, params, on_unknown="pin")
    assert hidden_left(small) >= len(ALIVE)


def test_output_channels_stay():
    fn, params = probe(jnp.tanh)
    params["fc2"]["kernel"][:, 1] = 0
    small, _ = compacted(fn, params, on_unknown="pin")
    assert small["fc2"]["kernel"].shape == (len(ALIVE), 3)


def test_inputs_stay_what_they_are():
    fn, params = probe(jnp.tanh)
    params["fc1"]["kernel"][2] = 0
    small, _ = compacted(fn, params, on_unknown="pin")
    assert hidden_left(small) == len(ALIVE)


class Training(nnx.Module):
    def __init__(self, rngs):
        self.fc1 = nnx.Linear(5, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.fc2 = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.fc2(nnx.relu(self.norm(self.fc1(x))))


def test_a_model_in_training_is_refused_or_exact():
    model = Training(nnx.Rngs(0))
    for leaf in (model.fc1.kernel, model.fc1.bias, model.norm.scale, model.norm.bias):
        leaf[...] = leaf[...].at[..., :4].set(0)
    before = np.array(model.norm.mean[...])
    try:
        small, _ = compaction.compact(model, X)
    except compaction.CompactionError as error:
        assert "eval()" in str(error)
    else:
        assert small.norm.mean.shape == (4,)
        np.testing.assert_allclose(small(X), model(X), atol=1e-5)
        return
    finally:
        np.testing.assert_array_equal(model.norm.mean[...], before)
    model.eval()
    small, _ = compaction.compact(model, X)
    np.testing.assert_allclose(small(X), model(X), atol=1e-5)
