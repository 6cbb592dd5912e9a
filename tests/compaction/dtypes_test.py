"""What goes does not depend on the dtype, and the output keeps it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_networks
from compaction_checks import (
    depends_on_input,
    groups_of,
    random_channels,
    relative_error,
    run,
    shapes,
)
from jax import lax

from sparsejax import compaction

TOLERANCE = {"bfloat16": 0.05, "float16": 0.005}


def check(seed, dtype):
    """Compact a network in float32 and in another dtype; False where degenerate."""
    net = random_networks.network(seed)
    report = groups_of(net.fn, net.params, net.x[:2])
    rng = np.random.default_rng([seed, 3])
    params = report.zero(net.params, random_channels(rng, report, (0.3, 0.5)))
    params = jax.tree.map(np.asarray, params)
    expected = run(net.fn, params, net.x)
    if not depends_on_input(expected):
        return False
    low = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    x = net.x.astype(dtype)
    assert [(g.name, g.size, g.pinned is None) for g in report.groups] == [
        (g.name, g.size, g.pinned is None) for g in groups_of(net.fn, low, x[:2]).groups
    ]
    _, full, _ = compaction.compact_fn(net.fn, params, net.x[:2], verify=False)
    fn, small, _ = compaction.compact_fn(net.fn, low, x[:2])
    assert shapes(small) == shapes(full), net.text
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(small))
    assert jax.eval_shape(fn, small, x).dtype == jax.eval_shape(net.fn, low, x).dtype
    error = relative_error(run(fn, small, x), run(net.fn, low, x))
    assert error < TOLERANCE[jnp.dtype(dtype).name], net.text
    return True


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_decisions_are_those_of_float32(dtype):
    assert sum(check(seed, dtype) for seed in range(4)) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("block", range(5))
def test_decisions_are_those_of_float32_in_many_networks(block, dtype):
    seeds = range(3000 + 10 * block, 3010 + 10 * block)
    assert sum(check(seed, dtype) for seed in seeds) >= 7


def test_parameters_in_float32_that_compute_in_bfloat16():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    params = {"a": normal(5, 16), "b": normal(16, 3)}
    params["a"][:, ::2] = 0

    def fn(p, x):
        half = lambda w: w.astype(jnp.bfloat16)
        y = jnp.dot(half(x), half(p["a"]), preferred_element_type=jnp.float32)
        return jax.nn.gelu(half(y)) @ half(p["b"])

    x = normal(4, 5)
    small_fn, small, _ = compaction.compact_fn(fn, params, x)
    assert small["a"].shape == (5, 8) and small["a"].dtype == np.float32
    assert relative_error(run(small_fn, small, x), run(fn, params, x)) < 0.02


def test_numpy_parameters_are_promoted_as_traced_ones():
    """NumPy adds 1e-5 to bfloat16 in float32; a traced array stays bfloat16."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(jnp.bfloat16)
    params = {"a": normal(5, 8), "var": abs(normal(8)), "b": normal(8, 3)}
    params["a"][:, :4] = 0

    def fn(p, x):
        y = lax.dot(x, p["a"]) * (p["var"] + 1e-5)[None]
        return lax.conv(y[..., None], p["b"].T[..., None], (1,), "SAME")[..., 0]

    small_fn, small, _ = compaction.compact_fn(fn, params, normal(2, 5))
    assert small["a"].shape == (5, 4)
    assert jax.eval_shape(small_fn, small, normal(2, 5)).dtype == jnp.bfloat16


def test_the_smallest_numbers_are_alive():
    """A weight that underflows in a product is not zero."""
    params = {
        "a": np.full((5, 8), 1e-30, np.float32),
        "b": np.full((8, 3), 1e30, np.float32),
    }
    params["a"][:, :4] = 0
    fn = lambda p, x: (x @ p["a"] * 1e-10) @ p["b"]
    _, small, _ = compaction.compact_fn(fn, params, np.ones((2, 5), np.float32))
    assert small["a"].shape == (5, 4)


def test_negative_zero_is_zero():
    params = {"a": np.ones((5, 8), np.float32), "b": np.ones((8, 3), np.float32)}
    params["a"][:, :4] = -0.0
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    _, small, _ = compaction.compact_fn(fn, params, np.ones((2, 5), np.float32))
    assert small["a"].shape == (5, 4)


def test_a_kernel_that_rounds_to_zero_is_dead_only_where_it_rounds():
    """float16 has nothing between 0 and 6e-8."""
    a = np.ones((5, 8), np.float32)
    a[:, :4] = 1e-9
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)

    def fn(p, x):
        y = x.astype(np.float16) @ p["a"].astype(np.float16)
        return jnp.tanh(y.astype(np.float32)) @ p["b"]

    params = {"a": a, "b": np.ones((8, 3), np.float32)}
    small_fn, small, _ = compaction.compact_fn(fn, params, x)
    assert small["a"].shape in ((5, 4), (5, 8))
    assert relative_error(run(small_fn, small, x), run(fn, params, x)) < 1e-3
    plain = lambda p, x: lax.mul(jnp.tanh(x @ p["a"]), np.float32(1e9)) @ p["b"]
    _, small, _ = compaction.compact_fn(plain, params, x)
    assert small["a"].shape == (5, 8)
