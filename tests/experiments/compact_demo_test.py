import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import compact_demo
from sparsejax import compaction


class Sum(nnx.Module):
    """Two layers whose outputs are added: their channels are the same."""

    def __init__(self, first, second):
        rngs = nnx.Rngs(0)
        self.first, self.second = (
            nnx.Linear(2, 4, kernel_init=lambda *_, k=k: jnp.asarray(k), rngs=rngs)
            for k in (first, second)
        )
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.first(x) + self.second(x)))


def test_the_weakest_channels_are_weak_in_all_layers_together():
    model = Sum([[1.0, 9, 0, 3], [1, 0, 2, 0]], [[1.0, 0, 8, 0], [1, 0, 0, 1]])
    groups = compaction.channel_groups(model, jnp.ones((1, 2)))
    choose = lambda share: compact_demo.weakest(groups, model, share)
    assert choose(0.25) == {"first": [0]}
    assert choose(0.5) == {"first": [0, 3]}
    assert choose(0.75) == {"first": [0, 2, 3]}
    masked = groups.zero(model, choose(0.5))
    np.testing.assert_array_equal(np.any(masked.first.kernel[...], 0), [0, 1, 1, 0])
