"""Re-estimated statistics are averages over batches, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax import compaction


class Network(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.blocks = nnx.List(
            [nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)]
        )

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.conv(x))))
        linear, norm = self.blocks
        return norm(linear(x.mean((1, 2))))


def batches(n=3):
    rng = np.random.default_rng(0)
    return [np.float32(rng.normal(i, 1 + i, (8, 5, 5, 2))) for i in range(n)]


def normalized(x):
    """Normalize [..., channels] by its own statistics."""
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes), x.var(axes)
    return mean, var, (x - mean) / np.sqrt(var + 1e-5)


def test_statistics_are_averages_over_batches():
    model = Network()
    model.eval()
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat))
    again = compaction.reestimate_statistics(model, batches())
    first, second = [], []
    for x in batches():
        mean, var, y = normalized(np.asarray(model.conv(x), np.float64))
        first.append((mean, var))
        y = np.maximum(y, 0).mean((1, 2))
        second.append(normalized(np.asarray(model.blocks[0](y), np.float64))[:2])
    for norm, found in ((again.norm, first), (again.blocks[1], second)):
        mean, var = np.mean(found, axis=0)
        np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(norm.var[...], var, rtol=1e-4, atol=1e-5)
        assert norm.use_running_average and norm.momentum == 0.99
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.BatchStat), before)
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.state(again, nnx.Param),
        nnx.state(model, nnx.Param),
    )


def test_one_batch_is_normalized_exactly():
    (x,) = batches(1)
    model = Network()
    model.eval()
    again = compaction.reestimate_statistics(model, [(x,)])
    y = again(x)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(y.var(0), 1, atol=1e-2)


def test_a_compacted_model_is_taken():
    (x,) = batches(1)
    model = Network()
    model.eval()
    report = compaction.channel_groups(model, x)
    masked = report.zero(model, {"conv": [1]})
    small, _ = compaction.compact(masked, x)
    again = compaction.reestimate_statistics(small, batches())
    assert again.norm.mean[...].shape == (2,)
    full = compaction.reestimate_statistics(masked, batches())
    np.testing.assert_allclose(again(x), full(x), rtol=1e-4, atol=1e-5)


def test_nothing_to_estimate_is_refused():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="must have nnx.BatchNorm layers.*got none"):
        compaction.reestimate_statistics(model, [jnp.ones((1, 2))])
    with pytest.raises(ValueError, match="at least one batch is needed"):
        compaction.reestimate_statistics(Network(), [])
