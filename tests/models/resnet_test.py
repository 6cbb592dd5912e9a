import functools

import jax
import jax.numpy as jnp
import network_shapes
import numpy as np
import pytest
from flax import nnx
from jaxprs import primitives

from sparsejax import models
from sparsejax.models.resnet import Padding


@pytest.mark.parametrize(
    ("depth", "shortcut", "expected"),
    [
        (20, "padding", 269_722),
        (20, "projection", 272_474),
        (32, "padding", 464_154),
        (32, "projection", 466_906),
    ],
)
def test_parameters_of_the_cifar_networks(depth, shortcut, expected, parameters):
    build = lambda rngs: models.resnet_cifar(depth, shortcut=shortcut, rngs=rngs)
    assert parameters.count(build) == expected


def test_resnet_32_of_width_32_is_the_wrn_32_2_of_structure_lth(parameters):
    build = lambda rngs: models.resnet_cifar(32, width=32, rngs=rngs)
    assert parameters.count(build) == 1_860_522  # published: 1.86 M
    prunable = {
        path: leaf.size
        for path, leaf in parameters.leaves(build).items()
        if path.endswith("conv/kernel") and not path.startswith("stem")
    }
    assert sum(prunable.values()) == 1_853_440


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (18, 11_689_512),
        (34, 21_797_672),
        (50, 25_557_032),
        (101, 44_549_160),
        pytest.param(152, 60_192_808, marks=pytest.mark.slow),
    ],
)
def test_parameters_for_imagenet_are_those_of_torchvision(depth, expected, parameters):
    assert parameters.count(lambda r: models.resnet(depth, rngs=r)) == expected


@pytest.mark.parametrize(
    ("depth", "classes", "expected"),
    [
        (18, 10, 11_173_962),
        (18, 100, 11_220_132),  # Structure-LTH: 11.22 M
        # Chase counts 23,652,032 weights of a head without bias, and no BatchNorm.
        (50, 100, 23_652_032 + 100 + 2 * 26_560),
    ],
)
def test_parameters_with_the_stem_for_cifar(depth, classes, expected, parameters):
    build = lambda rngs: models.resnet(depth, classes, stem="cifar", rngs=rngs)
    assert parameters.count(build) == expected


@pytest.mark.parametrize(
    ("depth", "classes", "stem", "shapes"),
    [
        (18, 10, "cifar", network_shapes.resnet18_cifar()),
        (50, 100, "cifar", network_shapes.resnet50(classes=100, stem=3)),
        (50, 1000, "imagenet", network_shapes.resnet50()),
    ],
)
def test_kernels_have_the_published_shapes(depth, classes, stem, shapes, parameters):
    build = lambda rngs: models.resnet(depth, classes, stem=stem, rngs=rngs)
    assert parameters.kernels(build) == sorted(shapes.values())


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


def test_a_stem_of_strides_two_halves_the_image_and_has_the_same_weights(parameters):
    def build(strides, rngs):
        return models.resnet_cifar(
            8, 5, in_channels=1, width=4, stem_strides=strides, rngs=rngs
        )

    def sizes(strides):
        model = build(strides, nnx.Rngs(0))
        outputs = [model.stem(jnp.zeros((1, 28, 28, 1)))]
        for block in model.blocks:
            outputs.append(block(outputs[-1]))
        return outputs

    halved, whole = (functools.partial(build, strides) for strides in (2, 1))
    assert parameters.count(halved) == parameters.count(whole)
    shapes = [x.shape[1:3] for x in jax.eval_shape(lambda: sizes(2))]
    assert shapes == [(14, 14), (14, 14), (7, 7), (4, 4)]


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


def test_stem_for_imagenet_divides_the_image_by_four():
    def sizes(images):
        stem = models.ImagenetStem(3, 8, activation=nnx.relu, rngs=nnx.Rngs(0))
        return stem.conv(images), stem(images)

    convolved, pooled = jax.eval_shape(sizes, jnp.zeros((2, 64, 64, 3)))
    assert convolved.shape == (2, 32, 32, 8)
    assert pooled.shape == (2, 16, 16, 8)


def test_bottleneck_has_its_strides_on_the_3x3_convolution():
    def sizes(x):
        options = dict(strides=2, shortcut="projection", activation=nnx.relu)
        block = models.Bottleneck(6, 5, **options, rngs=nnx.Rngs(0))
        first = block.conv1(x)
        return first, block.conv2(first), block(x)

    first, second, whole = jax.eval_shape(sizes, jnp.zeros((2, 8, 8, 6)))
    assert first.shape == (2, 8, 8, 5)
    assert second.shape == (2, 4, 4, 5)
    assert whole.shape == (2, 4, 4, 20)


@pytest.mark.parametrize("block", [models.BasicBlock, models.Bottleneck])
def test_block_without_branch_activates_its_input(block):
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 8)).astype(np.float32)

    @jax.jit
    def output(x):
        module = block(
            8,
            8 // block.expansion,
            strides=1,
            shortcut="projection",
            activation=nnx.relu,
            rngs=nnx.Rngs(0),
        )
        last = module.conv2 if block is models.BasicBlock else module.conv3
        last.norm.scale[...] = jnp.zeros(8)
        return module(x)

    np.testing.assert_array_equal(output(x), np.maximum(x, 0))


@pytest.mark.parametrize(
    ("build", "activations"),
    [
        (lambda **kw: models.resnet(18, stem="cifar", **kw), 17),
        (lambda **kw: models.ResNet((2,), (4,), 3, block=models.Bottleneck, **kw), 7),
        (lambda **kw: models.resnet_cifar(20, **kw), 19),
    ],
)
def test_activation_stands_in_place_of_every_relu(build, activations):
    def logits(images):
        return build(activation=jnp.tanh, rngs=nnx.Rngs(0))(images)

    jaxpr = jax.make_jaxpr(logits)(jnp.zeros((1, 32, 32, 3)))
    names = [name for name, _ in primitives(jaxpr)]
    assert names.count("tanh") == activations
    assert "custom_jvp_call" not in names  # nnx.relu


def test_padding_shortcut_passes_the_input_through():
    shortcut = Padding(4, 7, strides=2)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    y = shortcut(jnp.asarray(x))
    assert y.shape == (2, 4, 4, 7)
    np.testing.assert_array_equal(y[..., 1:5], x[:, ::2, ::2])
    assert not np.asarray(y)[..., [0, 5, 6]].any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda r: models.resnet(20, rngs=r), r"one of \[18, .* got 20.*resnet_cifar"),
        (
            lambda r: models.resnet(18, stem="patch", rngs=r),
            r"must be one of \['cifar', 'imagenet'\], got 'patch'",
        ),
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
        nnx.eval_shape(lambda: build(nnx.Rngs(0)))
