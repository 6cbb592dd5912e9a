"""Channels that are dead but for a constant: a shift of a norm, where only the kernel
of the convolution before it is masked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compaction_checks import QUICK, relative_error, run
from flax import nnx
from jax import lax

from sparsejax import compaction

DEAD = [0, 2, 3, 5]  # of 8 channels; their constants are 0, 0.7, 0.4 and 0.9
SHIFT = np.array([-1, 0.3, 0.7, 0.4, -0.2, 0.9, 0.1, 0.5], np.float32)
X = np.random.default_rng(0).normal(size=(4, 6, 6, 3)).astype(np.float32)


def conv(x, kernel, padding="SAME", groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def stem(p, x):
    return jax.nn.relu(conv(x, p["stem"]) + p["shift"][None, None, None])


def consumed(consumer, **leaves):
    """Return the stem and a consumer of it as a function, and its parameters."""
    rng = np.random.default_rng(1)
    params = {"stem": rng.normal(size=(3, 3, 3, 8)), "shift": SHIFT}
    params |= {name: rng.normal(size=shape) for name, shape in leaves.items()}
    params = {name: leaf.astype(np.float32) for name, leaf in params.items()}
    params["stem"][..., DEAD] = 0
    return lambda p, x: consumer(p, stem(p, x)), params


def pointwise():
    return consumed(lambda p, h: conv(h, p["w"]), w=(1, 1, 8, 4))


def valid():
    return consumed(lambda p, h: conv(h, p["w"], "VALID"), w=(3, 3, 8, 4))


def dense():
    return consumed(lambda p, h: h.mean((1, 2)) @ p["w"], w=(8, 4))


def flattened():
    return consumed(lambda p, h: h.reshape(-1, 288) @ p["w"], w=(288, 4))


def max_pooled():
    pool = lambda h: lax.reduce_window(
        h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME"
    )
    return consumed(lambda p, h: conv(pool(h), p["w"]), w=(1, 1, 8, 4))


def sigmoid():
    return consumed(lambda p, h: conv(jax.nn.sigmoid(h), p["w"]), w=(1, 1, 8, 4))


FOLDED = [pointwise, valid, dense, flattened, max_pooled, sigmoid]


def padded():
    return consumed(lambda p, h: conv(h, p["w"]), w=(3, 3, 8, 4))


def pooled_with_zeros():
    pool = lambda h: lax.reduce_window(
        h, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME"
    )
    return consumed(lambda p, h: conv(pool(h), p["w"]), w=(1, 1, 8, 4))


def depthwise():
    """The constant of a padded depthwise convolution differs at the border."""

    def consumer(p, h):
        return conv(jnp.tanh(conv(h, p["depth"], groups=8)), p["w"])

    return consumed(consumer, depth=(3, 3, 1, 8), w=(1, 1, 8, 4))


PADDED = [padded, pooled_with_zeros, depthwise]


def left(small):
    assert small["stem"].shape[-1] == small["shift"].shape[0]
    return small["shift"].shape[0]


def compacted(make, **options):
    fn, params = make()
    small_fn, small, report = compaction.compact_fn(fn, params, X, **options)
    return left(small), error_of(fn, params, small_fn, small), report


def error_of(fn, params, small_fn, small, x=X):
    return relative_error(run(small_fn, small, x), run(fn, params, x))


@pytest.mark.parametrize("make", FOLDED)
@pytest.mark.parametrize("constants", ["exact", "interior", "map"])
def test_constants_are_folded_where_that_is_exact(make, constants):
    channels, error, report = compacted(make, constants=constants)
    assert channels == 4
    assert error < 1e-5
    assert report.max_error < 1e-5 * report.scale


@pytest.mark.parametrize("make", PADDED)
def test_constants_that_differ_at_the_border_are_kept_and_reported(make):
    channels, error, report = compacted(make)
    assert channels == 7  # channel 0 is negative before the relu: no constant
    assert error < 1e-5
    (reason,) = report.kept.values()
    assert "3" in reason and "constant" in reason


@pytest.mark.parametrize("make", PADDED)
def test_the_interior_value_is_wrong_at_the_border_and_says_how_much(make):
    channels, error, report = compacted(make, constants="interior")
    assert channels == 4
    assert error > 1e-2
    assert 0.1 * error < report.max_error / report.scale < 10 * error


def test_the_interior_is_exact_in_the_interior():
    fn, params = padded()
    small_fn, small, _ = compaction.compact_fn(fn, params, X, constants="interior")
    inside = lambda y: y[:, 1:-1, 1:-1]
    expected = inside(run(fn, params, X))
    assert relative_error(inside(run(small_fn, small, X)), expected) < 1e-5


# A map is made for constants that are the same everywhere until they are padded.
@pytest.mark.parametrize(
    ("make", "left"), [(padded, 4), (pooled_with_zeros, 7), (depthwise, 7)]
)
def test_a_map_is_exact_at_the_border(make, left):
    channels, error, report = compacted(make, constants="map")
    assert channels == left
    assert error < 1e-5
    assert all("constant" in reason for reason in report.kept.values())


def test_a_map_of_another_resolution_is_refused_or_exact():
    fn, params = padded()
    small_fn, small, _ = compaction.compact_fn(fn, params, X, constants="map")
    larger = np.tile(X, (1, 2, 2, 1))
    try:
        error = error_of(fn, params, small_fn, small, larger)
    except (TypeError, ValueError):
        return
    assert error < 1e-5


@pytest.mark.parametrize("make", [*FOLDED, *PADDED])
def test_constants_are_kept_on_request(make):
    channels, error, _ = compacted(make, constants="keep")
    assert channels == (8 if make is sigmoid else 7)
    assert error < 1e-5


def test_a_constant_that_scales_a_live_value_stays():
    fn, params = consumed(
        lambda p, h: conv(h * conv(h, p["gate"]), p["w"]),
        gate=(1, 1, 8, 8),
        w=(1, 1, 8, 4),
    )
    small_fn, small, _ = compaction.compact_fn(fn, params, X, on_unknown="pin")
    assert left(small) == 7
    assert error_of(fn, params, small_fn, small) < 1e-5


def test_constants_of_a_residual_stream_add_up():
    def consumer(p, h):
        return conv(
            h + jnp.tanh(conv(h, p["branch"]) + p["bias"][None, None, None]), p["w"]
        )

    fn, params = consumed(consumer, branch=(1, 1, 8, 8), bias=(8,), w=(1, 1, 8, 4))
    params["branch"][..., DEAD] = 0
    small_fn, small, _ = compaction.compact_fn(fn, params, X)
    assert left(small) == 4
    assert error_of(fn, params, small_fn, small) < 1e-5


@pytest.mark.parametrize("constants", ["exact", "interior", "map", "keep"])
def test_no_constant_matters_where_nobody_reads_it(constants):
    fn, params = padded()
    params["w"][:, :, DEAD] = 0
    small_fn, small, _ = compaction.compact_fn(fn, params, X, constants=constants)
    assert left(small) == 4
    assert error_of(fn, params, small_fn, small) < 1e-5


class Net(nnx.Module):
    def __init__(self, padding, bias, rngs):
        self.conv1 = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.conv2 = nnx.Conv(8, 6, (3, 3), padding=padding, use_bias=bias, rngs=rngs)
        self.head = nnx.Linear(6, 4, use_bias=bias, rngs=rngs)
        self.norm.bias[...] = jnp.asarray(SHIFT)
        self.norm.mean[...] = jnp.asarray(SHIFT[::-1] / 4)
        self.conv1.kernel[...] = self.conv1.kernel[...].at[..., DEAD].set(0)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv1(x)))
        return self.head(jnp.tanh(self.conv2(x)).mean((1, 2)))


def output(model, x):
    return np.asarray(jax.jit(lambda m, x: m(x), compiler_options=QUICK)(model, x))


@pytest.mark.parametrize("backend", ["rebuild", "replay"])
@pytest.mark.parametrize("bias", [True, False])
def test_modules_take_constants_up_in_a_bias(bias, backend):
    model = Net("VALID", bias, nnx.Rngs(0))
    small, _ = compaction.compact(model, X, backend=backend)
    assert relative_error(output(small, X), output(model, X)) < 1e-5
    leaves = [leaf.shape for leaf in jax.tree.leaves(small)]
    assert (3, 3, 3, 4) in leaves and (3, 3, 4, 6) in leaves


def test_modules_keep_what_padding_makes_inexact():
    model = Net("SAME", True, nnx.Rngs(0))
    small, report = compaction.compact(model, X)
    assert small.conv2.kernel.shape == (3, 3, 7, 6)
    assert relative_error(output(small, X), output(model, X)) < 1e-5
    assert "conv1" in report.kept

    small, report = compaction.compact(model, X, constants="interior")
    assert small.conv2.kernel.shape == (3, 3, 4, 6)
    assert report.max_error > 1e-3 * report.scale


def test_a_map_is_for_replay_only():
    model = Net("SAME", True, nnx.Rngs(0))
    with pytest.raises(ValueError, match='backend="replay"'):
        compaction.compact(model, X, constants="map")
    small, _ = compaction.compact(model, X, constants="map", backend="replay")
    assert relative_error(output(small, X), output(model, X)) < 1e-5
    assert (3, 3, 4, 6) in [leaf.shape for leaf in jax.tree.leaves(small)]


def test_bad_options_are_refused():
    fn, params = pointwise()
    with pytest.raises(ValueError, match="constants.*'fold'"):
        compaction.compact_fn(fn, params, X, constants="fold")
    with pytest.raises(ValueError, match="on_unknown.*'ignore'"):
        compaction.compact_fn(fn, params, X, on_unknown="ignore")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "activation",
    [lambda h: jax.nn.gelu(h, approximate=False), jax.nn.sigmoid, jnp.arctan],
    ids=["gelu", "sigmoid", "arctan"],
)
def test_constants_of_half_precision_are_folded(dtype, activation):
    fn, params = consumed(lambda p, h: conv(activation(h), p["w"]), w=(1, 1, 8, 4))
    params = {name: jnp.asarray(leaf, dtype) for name, leaf in params.items()}
    x = jnp.asarray(X, dtype)
    small_fn, small, report = compaction.compact_fn(fn, params, x)
    assert left(small) == 4
    assert error_of(fn, params, small_fn, small, x) < 3e-2
