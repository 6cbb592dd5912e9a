"""What every network of the zoo does, checked on the smallest of each family."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax import masks, models

CLASSES = 5


def mlp(rngs, factor=1):
    widths = (7 * factor, 6 * factor)
    return models.MLP(16 * 16 * 3, widths, CLASSES, dropout_rate=0.2, rngs=rngs)


def vgg(rngs, factor=1):
    return models.VGG(
        (1, 2),
        (4 * factor, 6 * factor),
        CLASSES,
        image_size=16,
        hidden=(7 * factor,),
        dropout_rate=0.2,
        rngs=rngs,
    )


def basic_resnet(rngs, factor=1):
    return models.ResNet((1, 1), (4 * factor, 6 * factor), CLASSES, rngs=rngs)


def bottleneck_resnet(rngs, factor=1):
    return models.ResNet(
        (1, 2),
        (2 * factor, 3 * factor),
        CLASSES,
        block=models.Bottleneck,
        stem=models.ImagenetStem,
        rngs=rngs,
    )


def wide_resnet(rngs, factor=1):
    widths = (4 * factor, 6 * factor)
    return models.WideResNet(
        2, 4 * factor, widths, CLASSES, dropout_rate=0.2, rngs=rngs
    )


def mobilenet_v1(rngs, factor=1):
    blocks = [(6 * factor, 1), (8 * factor, 2)]
    return models.MobileNetV1(4 * factor, blocks, CLASSES, rngs=rngs)


def mobilenet_v2(rngs, factor=1):
    stages = [(1, 4 * factor, 1, 1), (2, 6 * factor, 2, 2)]
    return models.MobileNetV2(4 * factor, stages, 8 * factor, CLASSES, rngs=rngs)


def vit(rngs, factor=1):
    return models.ViT(
        image_size=16,
        patch_size=8,
        width=8 * factor,
        depth=2,
        num_heads=2 * factor,
        mlp_width=12 * factor,
        num_classes=CLASSES,
        dropout_rate=0.2,
        rngs=rngs,
    )


every_network = pytest.mark.parametrize(
    "build",
    [
        mlp,
        vgg,
        basic_resnet,
        bottleneck_resnet,
        wide_resnet,
        mobilenet_v1,
        mobilenet_v2,
        vit,
    ],
)


def concrete(build):
    """Fill an abstract network with numbers, which takes no compilation."""
    draw = np.random.default_rng(0).normal
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    def fill(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if leaf.ndim > 1:
            fan_in = leaf.size // leaf.shape[-1]
            return jnp.asarray(draw(size=leaf.shape) / fan_in**0.5, leaf.dtype)
        return jnp.asarray(0.5 + abs(draw(size=leaf.shape)), leaf.dtype)

    return graphdef, jax.tree.map(fill, state)


@every_network
def test_only_training_depends_on_the_batch_or_on_chance(build):
    graphdef, state = concrete(build)

    @jax.jit
    def in_both_modes(state, images):
        model = nnx.merge(graphdef, state)
        model.eval()
        evaluated = model(images)
        unchanged = jax.tree.leaves(nnx.state(model))
        model.train()
        return evaluated, unchanged, model(images), nnx.state(model)

    images = np.random.default_rng(1).normal(size=(6, 16, 16, 3)).astype(np.float32)
    evaluated, unchanged, trained, changed = in_both_modes(state, images)
    with_others, *_ = in_both_modes(state, np.concatenate([images[:2], -images[2:]]))

    assert evaluated.shape == trained.shape == (6, CLASSES)
    assert np.isfinite(evaluated).all() and np.isfinite(trained).all()
    assert np.abs(evaluated - trained).max() > 1e-2
    np.testing.assert_allclose(evaluated[:2], with_others[:2], rtol=1e-4, atol=1e-4)
    assert np.abs(evaluated[2:] - with_others[2:]).max() > 1e-2
    chex.assert_trees_all_equal(unchanged, jax.tree.leaves(state))
    before, after = (nnx.filter_state(s, nnx.Param) for s in (state, changed))
    chex.assert_trees_all_equal(after, before)
    before, after = (nnx.filter_state(s, nnx.BatchStat) for s in (state, changed))
    moved = jax.tree.map(lambda old, new: (old != new).all(), before, after)
    assert all(jax.tree.leaves(moved))


@every_network
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_traces_with_a_symbolic_batch(build, mode):
    def logits(images):
        model = build(nnx.Rngs(0))
        getattr(model, mode)()
        return model(images)

    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, 16, 16, 3), jnp.float32)
    assert jax.eval_shape(logits, images).shape == (batch, CLASSES)


@every_network
def test_no_width_is_stored_outside_of_the_layers_of_nnx(build):
    """The layers of a narrower network run in the modules of a wider one."""

    def logits(images):
        narrow, wide = build(nnx.Rngs(0)), build(nnx.Rngs(0), factor=2)
        move_layers(narrow, wide)
        return wide(images)

    images = jax.ShapeDtypeStruct((3, 16, 16, 3), jnp.float32)
    assert jax.eval_shape(logits, images).shape == (3, CLASSES)


def move_layers(source, target):
    """Replace the layers of NNX, and variables beside them, wherever they are."""
    for name, own in vars(target).items():
        new = getattr(source, name, None)
        if isinstance(own, nnx.List):
            for index, module in enumerate(own):
                if type(module).__module__.startswith("flax."):
                    own[index] = new[index]
                else:
                    move_layers(new[index], module)
        elif isinstance(own, nnx.Module) and type(own).__module__.startswith("sparse"):
            move_layers(new, own)
        elif isinstance(own, nnx.Module | nnx.Variable):
            setattr(target, name, new)


@every_network
def test_all_kernels_and_nothing_else_can_be_sparse(build, parameters):
    leaves = parameters.leaves(build)
    kernels = {path for path in leaves if path.endswith("/kernel")}
    assert set(masks.select_leaves(leaves)) == kernels
