"""Ghost skips alone, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax import recipes

IMAGES = np.random.default_rng(0).normal(size=(3, 7, 6, 4)).astype(np.float32)


def ghost_beside(strides=1, groups=1, n_out=8, **norm):
    conv = nnx.Conv(
        4, n_out, (3, 3), strides=strides, feature_group_count=groups, rngs=nnx.Rngs(0)
    )
    norm = {"momentum": 0.9, "epsilon": 1e-5, **norm}
    return recipes.GhostSkip(conv, nnx.BatchNorm(n_out, **norm, rngs=nnx.Rngs(0)))


def oracle(x, weights, groups, strides, epsilon):
    x = x[:, :: strides[0], :: strides[1]].astype(np.float64)
    of_group, n_out = weights.shape
    y = np.zeros((*x.shape[:-1], n_out))
    for o in range(n_out):
        first = o // (n_out // groups) * of_group
        for i in range(of_group):
            y[..., o] += x[..., first + i] * weights[i, o]
    mean, variance = y.mean((0, 1, 2)), y.var((0, 1, 2))
    return (y - mean) / np.sqrt(variance + epsilon)


@pytest.mark.parametrize(
    ("strides", "groups", "shape"),
    [
        (1, 1, (4, 8)),
        (2, 1, (4, 8)),
        ((2, 3), 2, (2, 8)),
        (2, 4, (1, 8)),
        (None, 4, (1, 4)),
    ],
)
def test_is_a_1x1_convolution_and_a_norm(strides, groups, shape):
    ghost = ghost_beside(strides, groups, shape[1])
    assert ghost.scale.shape == shape
    drawn = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    ghost.scale.set_value(jnp.asarray(drawn))
    both = (strides or 1,) * 2 if not isinstance(strides, tuple) else strides
    expected = oracle(IMAGES, drawn, groups, both, 1e-5)
    np.testing.assert_allclose(ghost(IMAGES), expected, rtol=1e-4, atol=1e-4)


def test_at_first_all_channels_are_equal_and_the_norm_makes_them_large():
    ghost = ghost_beside()
    assert (np.asarray(ghost.scale[...]) == np.float32(1e-4)).all()
    y = np.asarray(ghost(IMAGES))
    np.testing.assert_array_equal(y, np.broadcast_to(y[..., :1], y.shape))
    variance = (1e-4 * IMAGES.astype(np.float64).sum(-1)).var()
    expected = np.sqrt(variance / (variance + 1e-5))
    np.testing.assert_allclose(y[..., 0].std(), expected, rtol=1e-3)


def test_its_norm_has_the_options_of_the_other_and_is_new():
    conv = nnx.Conv(4, 8, (3, 3), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    norm = nnx.BatchNorm(8, momentum=0.7, epsilon=0.1, rngs=nnx.Rngs(0))
    for variable in (norm.scale, norm.bias, norm.mean, norm.var):
        assert variable is not None
        variable.set_value(jnp.full(8, 3.0))
    ghost = recipes.GhostSkip(conv, norm)
    assert (ghost.norm.momentum, ghost.norm.epsilon) == (0.7, 0.1)
    assert ghost.norm.scale is not None and ghost.norm.bias is not None
    values = [v[...] for v in (ghost.norm.scale, ghost.norm.var)]
    np.testing.assert_array_equal(values, np.ones((2, 8)))
    values = [v[...] for v in (ghost.norm.bias, ghost.norm.mean)]
    np.testing.assert_array_equal(values, np.zeros((2, 8)))
    assert norm.mean[0] == 3
    assert ghost(IMAGES[0], use_running_average=True).shape == (7, 6, 8)
    assert jax.tree.leaves(nnx.state(ghost, nnx.BatchStat))[0].max() == 0
