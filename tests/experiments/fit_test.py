import numpy as np
import optax
import pytest
from flax import nnx

from configs import base
from experiments import data, fit
from sparsejax import models, sparse_optax

DIGITS = data.load(base.Data("digits"))


@pytest.fixture(scope="module")
def trained():
    model = models.MLP(64, (32,), 10, rngs=nnx.Rngs(0))
    tx = sparse_optax.rigl(
        optax.adam(3e-3), sparsity=0.5, distribution="uniform", update_every=10
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    return model, optimizer, fit.fit(model, optimizer, DIGITS, num_steps=60)


def test_fit_trains_in_place(trained):
    model, optimizer, losses = trained
    assert losses.shape == (60,)
    assert losses[-10:].mean() < losses[:10].mean() / 2
    masks = sparse_optax.get_masks(optimizer.opt_state)["layers"]
    for layer, mask in zip(model.layers, masks.values(), strict=True):
        off = ~np.asarray(mask["kernel"])
        assert off.any()
        assert not np.asarray(layer.kernel)[off].any()


def test_accuracy_is_that_on_the_test_images(trained):
    model, _, _ = trained
    logits = np.asarray(model(DIGITS.normalize(DIGITS.test.images)))
    correct = sum(logits.argmax(axis=1) == DIGITS.test.labels)
    assert fit.accuracy(model, DIGITS) == pytest.approx(correct / 360)
    assert correct > 250


def test_the_seed_orders_the_images():
    def losses(seed):
        model = models.MLP(64, (), 10, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.sgd(0.01), wrt=nnx.Param)
        return fit.fit(
            model, optimizer, DIGITS, num_steps=3, batch_size=16, seed=seed
        ).tolist()

    assert losses(0) == losses(0) != losses(1)
