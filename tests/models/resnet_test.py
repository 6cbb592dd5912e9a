import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax import models
from sparsejax.models import resnet


def count(model):
    return sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize(
    ("depth", "shortcut", "parameters"),
    [
        (20, "padding", 269_722),
        (20, "projection", 272_474),
        (32, "padding", 464_154),
        (32, "projection", 466_906),
    ],
)
def test_parameters_of_the_cifar_networks(depth, shortcut, parameters):
    model = nnx.eval_shape(
        lambda: models.resnet_cifar(depth, shortcut=shortcut, rngs=nnx.Rngs(0))
    )
    assert count(model) == parameters


@pytest.mark.parametrize(
    ("shape", "shortcut"), [((28, 28, 1), "padding"), ((32, 32, 3), "projection")]
)
def test_batch_statistics_move_in_training_and_serve_in_evaluation(shape, shortcut):
    images = np.random.default_rng(1).normal(size=(6, *shape)).astype(np.float32)

    @jax.jit
    def in_both_modes():
        model = models.resnet_cifar(
            8, 5, in_channels=shape[-1], width=4, shortcut=shortcut, rngs=nnx.Rngs(0)
        )
        before = model.stem.norm.mean[...]
        model.train()
        trained = model(images)
        model.eval()
        moved = model.stem.norm.mean[...] - before
        return trained, model(images), model(images[:2]), moved

    trained, evaluated, evaluated_alone, moved = in_both_modes()
    assert trained.shape == evaluated.shape == (6, 5)
    assert np.isfinite(trained).all()
    assert (np.abs(moved) > 1e-6).all()
    # In evaluation the logits of an image do not depend on its neighbours.
    np.testing.assert_allclose(evaluated[:2], evaluated_alone, atol=1e-4)
    assert np.abs(trained - evaluated).max() > 1e-2


def test_every_stage_but_the_first_halves_the_image():
    def sizes():
        model = models.ResNet((1, 2, 1), (4, 6, 8), 5, rngs=nnx.Rngs(0))
        outputs = [model.stem(jnp.zeros((1, 32, 32, 3)))]
        for block in model.blocks:
            outputs.append(block(outputs[-1]))
        return outputs[1:]

    assert [x.shape[1:] for x in jax.eval_shape(sizes)] == [
        (32, 32, 4),
        (16, 16, 6),
        (16, 16, 6),
        (8, 8, 8),
    ]


def test_padding_shortcut_passes_the_input_through():
    shortcut = resnet.Padding(4, 7, strides=2)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    y = shortcut(jnp.asarray(x))
    assert y.shape == (2, 4, 4, 7)
    np.testing.assert_array_equal(y[..., 1:5], x[:, ::2, ::2])
    assert not np.asarray(y)[..., [0, 5, 6]].any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda r: models.resnet_cifar(18, rngs=r), r"must be 6n\+2 .* got 18"),
        (lambda r: models.resnet_cifar(2, rngs=r), r"must be 6n\+2 .* got 2"),
        (
            lambda r: models.resnet_cifar(8, shortcut="none", rngs=r),
            "must be 'projection' or 'padding', got 'none'",
        ),
        (
            lambda r: models.ResNet((1, 1), (4,), 5, rngs=r),
            r"stage_sizes=\(1, 1\) and widths=\(4,\)",
        ),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=message):
        build(nnx.Rngs(0))
