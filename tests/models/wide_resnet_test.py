import jax
import jax.numpy as jnp
import network_shapes
import numpy as np
import pytest
from flax import nnx

from sparsejax import models
from sparsejax.models.wide_resnet import PreActivationBlock


@pytest.mark.parametrize(
    ("depth", "widen", "classes", "expected"),
    [
        # SRigL counts 1,076,912 weights, and neither head bias nor BatchNorm.
        (22, 2, 10, 1_076_912 + 10 + 2 * (16 + 5 * 32 + 32 + 5 * 64 + 64 + 6 * 128)),
        (16, 8, 10, 10_961_370),  # the paper's Table 4: 11.0 M
        (28, 10, 10, 36_479_194),  # 36.5 M
        (28, 10, 100, 36_536_884),
    ],
)
def test_parameters_are_the_published_ones(depth, widen, classes, expected, parameters):
    build = lambda rngs: models.wide_resnet(depth, widen, classes, rngs=rngs)
    assert parameters.count(build) == expected


def test_kernels_of_wrn_22_2_have_the_published_shapes(parameters):
    shapes = network_shapes.wide_resnet22_2()
    build = lambda rngs: models.wide_resnet(22, 2, rngs=rngs)
    assert parameters.kernels(build) == sorted(shapes.values())


@pytest.mark.parametrize(("n_out", "strides"), [(6, 1), (8, 1), (6, 2)])
def test_block_without_branch_is_its_shortcut(n_out, strides):
    """It is the input itself, not activated, or the projected activated input."""
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 6)).astype(np.float32)

    @jax.jit
    def output(x):
        block = PreActivationBlock(
            6, n_out, strides=strides, dropout_rate=0.0, rngs=nnx.Rngs(0)
        )
        block.eval()
        block.conv2.kernel[...] = jnp.zeros((3, 3, n_out, n_out))
        kernel = None if block.shortcut is None else block.shortcut.kernel[0, 0]
        return block(x), kernel

    y, kernel = output(x)
    if kernel is not None:  # BatchNorm has its initial statistics
        x = np.maximum(x / np.sqrt(1 + 1e-5), 0)[:, ::strides, ::strides] @ kernel
    np.testing.assert_allclose(y, x, atol=1e-5)


@pytest.mark.parametrize("depth", [4, 20, 32])
def test_bad_input(depth):
    with pytest.raises(
        ValueError, match=rf"must be 6n\+4 .* got {depth}.*resnet_cifar"
    ):
        models.wide_resnet(depth, 2, rngs=nnx.Rngs(0))
