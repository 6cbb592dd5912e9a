import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jaxprs import primitives

from sparsejax import models


@pytest.mark.parametrize(
    ("width_multiplier", "millions"), [(1.0, 4.2), (0.75, 2.6), (0.5, 1.3), (0.25, 0.5)]
)
def test_parameters_are_those_of_the_papers_table_6(
    width_multiplier, millions, parameters
):
    counted = parameters.count(
        lambda rngs: models.mobilenet_v1(width_multiplier=width_multiplier, rngs=rngs)
    )
    assert round(counted / 1e6, 1) == millions


def test_parameters_to_the_last(parameters):
    """Keras has 4,231,976 that are trained."""
    assert parameters.count(lambda r: models.mobilenet_v1(rngs=r)) == 4_231_976


def test_network_for_cifar_is_that_of_structure_lth(parameters):
    """Published: 3.21 M parameters, of them 3,184,224 in kernels that are pruned."""
    build = lambda rngs: models.mobilenet_v1(10, stem_strides=1, rngs=rngs)
    assert parameters.count(build) == 3_217_226
    pruned = {
        path: leaf.size
        for path, leaf in parameters.leaves(build).items()
        if path.startswith("blocks") and path.endswith("kernel")
    }
    assert sum(pruned.values()) == 3_184_224


@pytest.mark.parametrize(("stem_strides", "size"), [(2, 1), (1, 2)])
def test_stem_strides_decide_what_is_left_of_the_image(stem_strides, size):
    def blocks(images):
        model = models.mobilenet_v1(stem_strides=stem_strides, rngs=nnx.Rngs(0))
        x = model.stem(images)
        for block in model.blocks:
            x = block(x)
        return x

    last = jax.eval_shape(blocks, jnp.zeros((1, 32, 32, 3)))
    assert last.shape == (1, size, size, 1024)


def test_activation_stands_in_place_of_every_relu():
    def logits(images):
        options = {"activation": jnp.tanh, "rngs": nnx.Rngs(0)}
        return models.MobileNetV1(4, [(6, 1), (8, 2)], 5, **options)(images)

    names = [
        name
        for name, _ in primitives(jax.make_jaxpr(logits)(jnp.zeros((1, 16, 16, 3))))
    ]
    assert names.count("tanh") == 5
    assert "custom_jvp_call" not in names  # nnx.relu
