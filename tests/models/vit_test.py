import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from sparsejax import masks, models

TINY = dict(image_size=12, patch_size=4, width=8, depth=2, num_heads=2, mlp_width=12)


@pytest.mark.parametrize(
    ("build", "expected"),
    [(models.vit_s16, 22_050_664), (models.vit_b16, 86_567_656)],
)
def test_parameters_are_the_published_ones(build, expected, parameters):
    assert parameters.count(lambda rngs: build(rngs=rngs)) == expected


def test_the_sparse_weights_of_vit_b16_are_those_of_srigl(parameters):
    """They are 50, of which 12 hold queries, keys and values as one matrix."""
    chosen = masks.select_leaves(parameters.leaves(lambda r: models.vit_b16(rngs=r)))
    assert len(chosen) == 50 + 2 * 12
    layouts = {leaf.layout.matrix_shape(leaf.shape) for leaf in chosen.values()}
    assert layouts == {(768, 768), (3072, 768), (768, 3072), (1000, 768)}


def test_it_computes_the_equations_of_the_paper():
    build = lambda: models.ViT(**TINY, num_classes=5, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(nnx.eval_shape(build))
    draw = np.random.default_rng(1).normal
    params = jax.tree.map(lambda x: np.asarray(draw(size=x.shape), x.dtype) / 2, params)
    images = draw(size=(3, 12, 12, 3)).astype(np.float32)
    logits = jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))(params, images)
    expected = oracle(nnx.to_pure_dict(params), images.astype(np.float64))
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


def oracle(p, images):
    """Equations 1 to 4 of the paper, for the sizes of `TINY`."""

    def linear(p, x):
        return x @ p["kernel"] + p["bias"]

    def norm(p, x):
        deviation = x - x.mean(-1, keepdims=True)
        variance = (deviation**2).mean(-1, keepdims=True)
        return deviation / np.sqrt(variance + 1e-6) * p["scale"] + p["bias"]

    def attention(p, x):
        project = lambda p: np.einsum("bti,ihd->bhtd", x, p["kernel"])
        query, key, value = (
            project(p[name]) + p[name]["bias"][:, None]
            for name in ("query", "key", "value")
        )
        scores = query @ key.swapaxes(-1, -2) / np.sqrt(4)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads = weights / weights.sum(-1, keepdims=True) @ value
        return np.einsum("bhtd,hdo->bto", heads, p["out"]["kernel"]) + p["out"]["bias"]

    patches = images.reshape(3, 3, 4, 3, 4, 3).transpose(0, 1, 3, 2, 4, 5)
    kernel = p["patches"]["kernel"].reshape(48, 8)
    x = patches.reshape(3, 9, 48) @ kernel + p["patches"]["bias"]
    first = np.broadcast_to(p["class_embedding"], (3, 1, 8))
    x = np.concatenate([first, x], axis=1) + p["position_embedding"]
    for block in p["blocks"].values():
        x = x + attention(block["attention"], norm(block["norm1"], x))
        hidden = linear(block["linear1"], norm(block["norm2"], x))
        hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
        x = x + linear(block["linear2"], hidden)
    return linear(p["head"], norm(p["norm"], x[:, 0]))


def test_dropout_of_1_leaves_the_head_alone():
    """Every sum is then of zeros, and LayerNorm of zeros is its bias, which is 0."""

    @jax.jit
    def logits(images):
        model = models.ViT(**TINY, num_classes=5, dropout_rate=1.0, rngs=nnx.Rngs(0))
        model.head.bias[...] = jnp.arange(5.0)
        return model(images)

    np.testing.assert_array_equal(logits(jnp.ones((2, 12, 12, 3))), [range(5)] * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 5}, "image_size=12 and patch_size=5"),
        ({"num_heads": 3}, "width=8 and num_heads=3"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        models.ViT(**(TINY | change), num_classes=5, rngs=nnx.Rngs(0))
