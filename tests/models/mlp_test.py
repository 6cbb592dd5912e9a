import jax
import numpy as np
import pytest
from flax import nnx

from sparsejax import models


def test_lenet_300_100_has_the_published_size(parameters):
    assert parameters.count(lambda rngs: models.lenet_300_100(rngs=rngs)) == 266_610


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


def test_dropout_zeroes_hidden_units_in_training_and_draws_anew():
    model = models.MLP(4, (400,), 400, dropout_rate=0.25, rngs=nnx.Rngs(0))
    model.layers[1].kernel[...] = np.eye(400, dtype=np.float32)
    model.layers[0].bias[...] = np.full(400, 3.0, np.float32)

    @nnx.jit
    def hidden(model):
        return model(np.zeros((2, 4), np.float32))

    first, second = np.asarray(hidden(model)), np.asarray(hidden(model))
    assert set(np.unique(first)) == {0.0, 4.0}  # 3 / (1 - 0.25)
    assert 0.15 < (first == 0).mean() < 0.35
    assert (first != second).any()
    model.eval()
    np.testing.assert_array_equal(hidden(model), np.full((2, 400), 3.0))
