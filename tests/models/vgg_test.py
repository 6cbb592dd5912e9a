import jax
import jax.numpy as jnp
import network_shapes
import pytest
from flax import nnx
from jaxprs import primitives

from sparsejax import models


@pytest.mark.parametrize(
    ("depth", "expected"),
    [(11, 132_868_840), (13, 133_053_736), (16, 138_365_992), (19, 143_678_248)],
)
def test_parameters_for_imagenet_are_those_of_torchvision(depth, expected, parameters):
    assert parameters.count(lambda rngs: models.vgg(depth, rngs=rngs)) == expected


def test_vgg_16_for_cifar_is_that_of_structure_lth(parameters):
    """Published: 14.72 M parameters, of them 14,710,464 in kernels that are pruned."""
    leaves = parameters.leaves(lambda rngs: models.vgg_cifar(16, rngs=rngs))
    sizes = {path: leaf.size for path, leaf in leaves.items()}
    convolved = sum(n for path, n in sizes.items() if path.endswith("conv/kernel"))
    biases = sum(n for path, n in sizes.items() if path.endswith("conv/bias"))
    assert convolved == 14_710_464
    assert sum(sizes.values()) == convolved + biases + 2 * biases + 5_130 == 14_728_266


def test_vgg_19_for_cifar_is_that_of_chase(parameters):
    shapes = network_shapes.vgg19(classes=100)
    build = lambda rngs: models.vgg_cifar(19, 100, rngs=rngs)
    assert parameters.kernels(build) == sorted(shapes.values())


def test_every_stage_halves_the_image():
    def sizes(images):
        build = lambda size: models.VGG(
            (1, 2, 1), (4, 6, 5), 3, image_size=size, rngs=nnx.Rngs(0)
        )
        return [build(size)(images[:, :size, :size]) for size in (8, 16, 31)]

    logits = jax.eval_shape(sizes, jnp.zeros((2, 31, 31, 3)))
    assert [x.shape for x in logits] == [(2, 3)] * 3


def test_head_sees_every_pixel_that_is_left():
    build = lambda: models.vgg(11, 7, image_size=64, rngs=nnx.Rngs(0))
    head = nnx.eval_shape(build).head
    assert [layer.kernel.shape for layer in head.layers] == [
        (512 * 2 * 2, 4096),
        (4096, 4096),
        (4096, 7),
    ]


def test_activation_follows_every_convolution():
    def logits(images):
        model = models.vgg_cifar(16, activation=jnp.tanh, rngs=nnx.Rngs(0))
        return model(images)

    jaxpr = jax.make_jaxpr(logits)(jnp.zeros((1, 32, 32, 3)))
    names = [name for name, _ in primitives(jaxpr)]
    assert names.count("tanh") == names.count("conv_general_dilated") == 13
    assert "custom_jvp_call" not in names  # nnx.relu


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda r: models.vgg(15, rngs=r), r"^vgg\(depth.* \[11, 13, 16, 19\], got 15"),
        (lambda r: models.vgg_cifar(8, rngs=r), r"^vgg_cifar\(depth.* got 8"),
        (lambda r: models.vgg(16, image_size=28, rngs=r), "at least 32.* got 28"),
        (
            lambda r: models.VGG((1, 1), (4,), 5, image_size=8, rngs=r),
            r"stage_sizes=\(1, 1\) and widths=\(4,\)",
        ),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=message):
        build(nnx.Rngs(0))
