import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxprs import primitives

from sparsejax import models
from sparsejax.models.mobilenet_v2 import InvertedResidual


@pytest.mark.parametrize(
    ("width_multiplier", "expected"),
    [
        (1.0, 3_504_872),  # torchvision; the paper has 3.4 M
        (0.5, 1_968_680),  # timm: 1.97 M
        (1.4, 6_108_776),  # timm: 6.11 M
    ],
)
def test_parameters_are_the_published_ones(width_multiplier, expected, parameters):
    counted = parameters.count(
        lambda rngs: models.mobilenet_v2(width_multiplier=width_multiplier, rngs=rngs)
    )
    assert counted == expected


@pytest.mark.parametrize("expansion", [1, 3])
@pytest.mark.parametrize(("n_out", "strides"), [(4, 1), (4, 2), (6, 1)])
def test_block_adds_its_input_where_shapes_agree(n_out, strides, expansion):
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 4)).astype(np.float32)

    @jax.jit
    def output(x):
        block = InvertedResidual(
            4, n_out, strides=strides, expansion=expansion, rngs=nnx.Rngs(0)
        )
        block.project.norm.scale[...] = jnp.zeros(n_out)
        return block(x)

    expected = x if (n_out, strides) == (4, 1) else 0 * x[:, ::strides, ::strides, :1]
    np.testing.assert_array_equal(output(x), np.broadcast_to(expected, output(x).shape))


def test_projection_is_linear_and_all_else_is_capped_at_six():
    def outputs(x):
        block = InvertedResidual(4, 6, strides=1, expansion=3, rngs=nnx.Rngs(0))
        block.eval()
        block.depthwise.norm.bias[...] = jnp.full(12, 100.0)
        block.project.norm.bias[...] = jnp.full(6, -1e4)
        return block(x), block.project(jnp.full((1, 3, 3, 12), 6.0))

    block, projected = jax.jit(outputs)(jnp.ones((1, 3, 3, 4)))
    assert (block < -1e3).all()
    np.testing.assert_allclose(block, projected, rtol=1e-5)


@pytest.mark.parametrize(
    ("multiplier", "widths"),
    [(1.0, (32, 96, 1280)), (0.35, (16, 32, 1280)), (1.4, (48, 136, 1792))],
)
def test_width_multiplier_rounds_to_multiples_of_8(multiplier, widths):
    build = lambda: models.mobilenet_v2(width_multiplier=multiplier, rngs=nnx.Rngs(0))
    model = nnx.eval_shape(build)
    fifth_stage = model.blocks[-5].project
    layers = (model.stem, fifth_stage, model.last)
    assert tuple(layer.conv.out_features for layer in layers) == widths


def test_activation_stands_in_place_of_every_relu():
    def logits(images):
        options = {"activation": jnp.tanh, "rngs": nnx.Rngs(0)}
        return models.MobileNetV2(4, [(1, 4, 1, 1), (2, 6, 2, 2)], 8, 5, **options)(
            images
        )

    names = [
        name
        for name, _ in primitives(jax.make_jaxpr(logits)(jnp.zeros((1, 16, 16, 3))))
    ]
    assert names.count("tanh") == 7
    assert "custom_jvp_call" not in names  # nnx.relu
