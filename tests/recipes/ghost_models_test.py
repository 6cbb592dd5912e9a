"""Ghosts in models of Flax NNX: where they stand, and what they must leave alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax import models, recipes

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)


class Siblings(nnx.Module):
    """A model as users write them, with all that may stand in the way."""

    def __init__(self, rngs):
        options = {"strides": 2, "padding": [(1, 1), (1, 1)]}
        self.conv1 = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.bn1 = nnx.BatchNorm(4, rngs=rngs)
        self.conv2 = nnx.Conv(4, 6, (3, 3), **options, use_bias=False, rngs=rngs)
        self.bn2 = nnx.BatchNorm(6, rngs=rngs)
        self.conv3 = nnx.Conv(6, 6, (3, 3), padding="VALID", rngs=rngs)
        self.bn3 = nnx.BatchNorm(6, rngs=rngs)
        self.conv4 = nnx.Conv(6, 6, (3, 3), rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.fc = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x, train=True):
        average = not train
        x = jax.nn.relu(self.bn1(self.conv1(x), use_running_average=average))
        x = jax.nn.relu(self.bn2(self.conv2(x), use_running_average=average))
        x = jnp.maximum(self.bn3(self.conv3(x), use_running_average=average), 0)
        x = self.dropout(self.conv4(x).mean((1, 2)), deterministic=average)
        return self.fc(x)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 3, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.norm(self.conv(x)))


class CompiledBlock(Block):
    @nnx.jit
    def __call__(self, x):
        return super().__call__(x)


class Stacked(nnx.Module):
    """Blocks of stacked parameters, scanned over and computed again for gradients."""

    def __init__(self, rngs):
        make = nnx.vmap(Block, in_axes=0, out_axes=0)
        self.blocks = nnx.split_rngs(splits=2)(make)(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(block, x):
            return block(x)

        return run(self.blocks, x)


def small_resnet(rngs, **options):
    return models.ResNet((1, 1), (3, 4), 5, rngs=rngs, **options)


def of_blocks(rngs):
    return nnx.Sequential(*(CompiledBlock(rngs) for _ in range(2)))


def flat(tree):
    return {path: v.get_value() for path, v in nnx.to_flat_state(tree)}


def is_ghost(path):
    return recipes.is_ghost("/".join(map(str, path)))


def in_both_modes(model, images):
    """Return logits, numbers after training, and gradients."""
    model = nnx.clone(model)
    model.eval()
    evaluated = model(images, False) if isinstance(model, Siblings) else model(images)
    model.train()
    loss = lambda model: (jnp.sin(logits := model(images)).sum(), logits)
    (_, trained), gradients = nnx.value_and_grad(loss, has_aux=True)(model)
    after = nnx.state(model, nnx.Not(nnx.RngState))
    return (trained, evaluated), flat(after), flat(nnx.state(gradients))


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


every_shape = pytest.mark.parametrize(
    "build", [Siblings, of_blocks, pytest.param(Stacked, marks=pytest.mark.slow)]
)


def with_ghosts_everywhere(plain):
    where = (lambda path, conv: True) if isinstance(plain, Stacked) else None
    ghosted, report = recipes.add_ghosts(plain, IMAGES, where=where)
    assert report.neurons and report.skips
    return ghosted


@nnx.jit
def logits(model, images):
    return model(images)


@every_shape
def test_at_intensity_0_all_is_as_without_ghosts_and_they_rest(build):
    plain = build(nnx.Rngs(0))
    ghosted = with_ghosts_everywhere(plain)
    if build is Siblings:  # it runs operation by operation
        run, assert_same = in_both_modes, assert_same_bits
    else:  # in two programs XLA fuses, and so rounds, differently
        run = nnx.jit(in_both_modes)
        assert_same = functools.partial(
            jax.tree.map,
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
        )
    expected = run(plain, IMAGES)
    recipes.set_intensity(ghosted, 0.0)
    logits, after, gradients = run(ghosted, IMAGES)
    assert_same(logits, expected[0])
    for got, plain_ones in ((after, expected[1]), (gradients, expected[2])):
        assert_same({p: got[p] for p in plain_ones}, dict(plain_ones))
        assert all(is_ghost(path) for path in got.keys() - plain_ones.keys())
    resting = {path: g for path, g in gradients.items() if is_ghost(path)}
    assert resting and not any(map(np.any, resting.values()))
    if build is Siblings:
        return
    recipes.set_intensity(ghosted, 1.0)
    with_ghosts, _, gradients = run(ghosted, IMAGES)
    for a, b in zip(with_ghosts, expected[0], strict=True):
        assert np.abs(a - b).max() > 1e-2
    # Before a norm a common factor of all weights changes next to nothing.
    assert all(np.any(gradients[path]) for path in resting if path[-1] == "bias")


@every_shape
def test_removal_leaves_nothing(build):
    plain = build(nnx.Rngs(0))
    ghosted = with_ghosts_everywhere(plain)
    before = nnx.graphdef(plain)
    recipes.set_intensity(ghosted, 0.0)
    removed = recipes.remove_ghosts(ghosted)
    assert type(removed) is type(plain) and nnx.graphdef(removed) == before
    assert nnx.graphdef(plain) == before
    assert flat(nnx.state(removed)).keys() == flat(nnx.state(plain)).keys()
    given = logits(ghosted, IMAGES)
    np.testing.assert_allclose(logits(removed, IMAGES), given, rtol=1e-4, atol=1e-5)
    state = recipes.remove_ghosts(nnx.state(ghosted))
    assert jax.tree.structure(state) == jax.tree.structure(nnx.state(plain))
    with pytest.raises(ValueError, match="there are ghosts in the model already"):
        recipes.add_ghosts(ghosted, IMAGES)


def test_classes_stay_base_classes_and_parts_of_a_model_say_so():
    ghosted, _ = recipes.add_ghosts(Siblings(nnx.Rngs(0)), IMAGES)
    again, _ = recipes.add_ghosts(Siblings(nnx.Rngs(1)), IMAGES)
    assert isinstance(ghosted, Siblings) and type(ghosted) is type(again)
    assert isinstance(ghosted.bn2, nnx.BatchNorm)
    assert isinstance(ghosted.ghost_intensity, recipes.GhostIntensity)
    assert not isinstance(ghosted.ghost_intensity, nnx.Param)
    with pytest.raises(RuntimeError, match="GhostedBatchNorm was called outside of"):
        ghosted.bn2(IMAGES)
    other = ghosted.conv2
    ghosted.conv2 = nnx.Conv(4, 6, (3, 3), strides=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="must be given the output of its convol"):
        ghosted(IMAGES)
    ghosted.conv2 = other


def abstract(build):
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    reports = []

    def make():
        ghosted, report = recipes.add_ghosts(build(nnx.Rngs(0)), images)
        reports.append(report)
        return ghosted

    return nnx.eval_shape(make), reports[0]


def test_a_resnet18_has_as_many_ghosts_as_the_authors():
    resnet = lambda rngs: models.resnet(18, 100, stem="cifar", rngs=rngs)
    ghosted, report = abstract(resnet)
    ghosts = {p: x.size for p, x in flat(nnx.state(ghosted)).items() if is_ghost(p)}
    of_norms = sum(n for p, n in ghosts.items() if p[-1] in ("scale", "bias"))
    weights = sum(n for p, n in ghosts.items() if p[-2:] == ("ghost_skip", "scale"))
    assert (weights, of_norms - weights) == (1_220_608, 7_680)
    assert len(report.skips) == 16 and len(report.neurons) == 17
    assert report.passed_over == {
        "stem/conv": "it is the stem",
        **{f"blocks/{i}/shortcut/conv": "it is 1x1" for i in (2, 4, 6)},
    }


def mobilenet_v2(rngs, **options):
    stages = [(2, 6, 1, 2)]
    return models.MobileNetV2(4, stages, 8, 5, rngs=rngs, **options)


@pytest.mark.parametrize(
    ("build", "beside"),
    [
        (lambda r: models.vgg_cifar(11, rngs=r), r"stages/\d/\d/conv"),
        (lambda r: small_resnet(r, block=models.Bottleneck), r"blocks/\d/conv2/conv"),
        (lambda r: models.MobileNetV1(4, [(6, 1), (8, 2)], 5, rngs=r), ".*depthwise.*"),
        (mobilenet_v2, ".*depthwise.*"),
        (lambda r: nnx.Sequential(Block(r), Block(r)), r"layers/\d/conv"),
    ],
)
def test_ghosts_stand_beside_what_is_larger_than_1x1(build, beside):
    ghosted, report = abstract(build)
    convs = [
        "/".join(map(str, path[:-1]))
        for path, x in flat(nnx.state(ghosted, nnx.Param)).items()
        if path[-1] == "kernel" and x.ndim == 4
    ]
    expected = {path for path in convs if re.fullmatch(beside, path)}
    assert report.skips.keys() == expected and expected
    assert report.passed_over.keys() == set(convs) - expected
    for path in expected:
        conv, norm = path, report.skips[path]
        assert conv.rsplit("/", 1)[0] == norm.rsplit("/", 1)[0]


def test_says_what_was_found_and_why_not():
    _, report = recipes.add_ghosts(Siblings(nnx.Rngs(0)), IMAGES)
    lines = str(report).splitlines()
    assert [line.split(" (")[0] for line in lines[:3]] == [
        "neuron: relu",
        "neuron: relu",
        "neuron: max",
    ]
    assert all("ghost_models_test.py:" in line for line in lines[:3])
    assert lines[3:] == [
        "skip: beside conv2, into bn2",
        "  conv1: it is the stem",
        "  conv3: (4, 4, 4, 6) to (4, 2, 2, 6) is more than strides",
        "  conv4: no BatchNorm reads its output",
    ]
    chosen = lambda path, conv: path == "conv1" and conv.out_features == 4
    _, report = recipes.add_ghosts(Siblings(nnx.Rngs(0)), IMAGES, where=chosen)
    assert report.skips == {"conv1": "bn1"}


def test_the_activation_of_the_zoo_is_the_same_as_that_which_is_found():
    neuron = recipes.GhostNeuron("mish", jax.nn.relu6)
    plain, given = (
        mobilenet_v2(nnx.Rngs(0)),
        mobilenet_v2(nnx.Rngs(0), activation=neuron),
    )
    of_given, _ = recipes.add_ghosts(given, IMAGES, neurons=None)
    of_plain, _ = recipes.add_ghosts(plain, IMAGES, neurons="mish")
    ghosts = logits(of_given, IMAGES)
    np.testing.assert_allclose(ghosts, logits(of_plain, IMAGES), rtol=1e-4, atol=1e-5)
    expected = logits(plain, IMAGES)
    np.testing.assert_array_equal(logits(given, IMAGES), expected)
    assert np.abs(ghosts - expected).max() > 1e-3
    removed = recipes.remove_ghosts(of_given)
    assert nnx.graphdef(removed) == nnx.graphdef(plain)


class Growing(nnx.Module):
    """Keeps what it computes in a variable that it makes when it is called."""

    def __call__(self, x):
        self.activated = nnx.Intermediate(nnx.relu(x))
        return self.activated[...]


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "must be an nnx.Module", lambda: recipes.add_ghosts(jnp.sin, 1.0)),
        (
            ValueError,
            "Linear has none: neither jax.nn.relu",
            lambda: recipes.add_ghosts(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), IMAGES),
        ),
        (
            ValueError,
            "MLP has none that can have a ghost: it calls no nnx.Conv",
            lambda: recipes.add_ghosts(
                models.MLP(3, (2,), 2, rngs=nnx.Rngs(0)), IMAGES[0, 0]
            ),
        ),
        (
            ValueError,
            "conv2: where= leaves it out",
            lambda: recipes.add_ghosts(
                Siblings(nnx.Rngs(0)), IMAGES, where=lambda path, conv: path == "conv4"
            ),
        ),
        (
            ValueError,
            "asks for no ghosts",
            lambda: recipes.add_ghosts(Growing(), IMAGES, neurons=None, skips=False),
        ),
        (
            ValueError,
            "neurons=.... must be one of",
            lambda: recipes.add_ghosts(Growing(), IMAGES, neurons="gelu"),  # pyright: ignore
        ),
        (
            ValueError,
            "this Growing has no ghosts",
            lambda: recipes.set_intensity(Growing(), 1.0),
        ),
        (
            ValueError,
            "makes or deletes activated",
            lambda: recipes.add_ghosts(Growing(), IMAGES, skips=False)[0](IMAGES),
        ),
        (ValueError, "must be one of", lambda: recipes.GhostNeuron("gelu")),  # pyright: ignore
    ],
)
def test_refuses_what_cannot_be_meant(error, words, call):
    with pytest.raises(error, match=words):
        call()
