import jax
import numpy as np
import pytest
from flax import nnx

from sparsejax import models


def test_lenet_300_100_has_the_published_size():
    model = nnx.eval_shape(lambda: models.lenet_300_100(rngs=nnx.Rngs(0)))
    parameters = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(p.size for p in parameters) == 266_610


@pytest.mark.parametrize("widths", [(), (7,), (8, 6, 5)])
def test_mlp_is_relu_of_affine_maps_of_the_flattened_input(widths):
    model = models.MLP(12, widths, 3, rngs=nnx.Rngs(0))
    x = np.random.default_rng(1).normal(size=(5, 2, 6)).astype(np.float32)

    expected = x.reshape(5, 12)
    for index, layer in enumerate(model.layers):
        expected = expected @ np.asarray(layer.kernel) + np.asarray(layer.bias)
        if index < len(widths):
            expected = np.maximum(expected, 0)

    logits = jax.jit(lambda model, x: model(x))(model, x)
    assert logits.shape == (5, 3)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_the_seed_determines_the_weights():
    first, again, other = (
        np.asarray(models.MLP(4, (), 3, rngs=nnx.Rngs(seed)).layers[0].kernel)
        for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
