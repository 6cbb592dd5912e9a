"""Exported models, served in a process that imports no Flax."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import sparsejax
from sparsejax import models, serving

ROOT = pathlib.Path(sparsejax.__file__).parents[1]

# Serves each file on the inputs that lie beside it.
SERVE = """
import json, pathlib, sys
import numpy as np
from sparsejax import serving

for path in map(pathlib.Path, sys.argv[1:]):
    served = serving.load(path)
    with np.load(path.with_suffix(".in.npz")) as inputs:
        outputs = {size: served(x) for size, x in inputs.items()}
    np.savez(path.with_suffix(".out.npz"), **outputs)
heavy = ("flax", "optax", "chex", "orbax", "sparsejax.masks", "sparsejax.sparse_optax")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""


class Block(nnx.Module):
    def __init__(self, width, *, rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.linear = nnx.Linear(width, width, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.drop(nnx.gelu(self.linear(self.norm(x))))


class TinyViT(nnx.Module):
    """Patches, attention and eleven blocks, of which text sorts the last third."""

    def __init__(self, width=4, *, rngs):
        self.patches = nnx.Conv(3, width, (4, 4), strides=4, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.blocks = nnx.List(Block(width, rngs=rngs) for _ in range(11))

    def __call__(self, x):
        x = self.norm(self.patches(x.astype(self.patches.kernel.dtype)))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x + self.attention(x)
        for block in self.blocks:
            x = block(x)
        return x.mean(axis=1).astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(eq=False)
class Layer:
    """A module as in Equinox: a tree with a call, one of whose leaves is a function."""

    weight: jax.Array
    activation: Callable

    def __call__(self, x):
        return self.activation(x @ self.weight)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.BatchNorm(use_running_average=not train)(linen.Conv(3, (3, 3))(x))
        return linen.Dense(2)(x.reshape(x.shape[0], -1))


def half_precision():
    model = TinyViT(rngs=nnx.Rngs(1))
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model, nnx.Param))
    nnx.update(model, halved)
    return model


def serve_elsewhere(paths, shapes, sizes):
    """Serve files in a new process; return the inputs, the outputs and what it said."""
    inputs = {}
    for path, shape in zip(paths, shapes, strict=True):
        rng = np.random.default_rng(len(path.name))
        inputs[path] = {
            str(size): rng.normal(size=(size, *shape)).astype(np.float32)
            for size in sizes
        }
        np.savez(path.with_suffix(".in.npz"), **inputs[path])
    done = subprocess.run(
        [sys.executable, "-c", SERVE, *map(str, paths)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    outputs = {path: np.load(path.with_suffix(".out.npz")) for path in paths}
    return inputs, outputs, json.loads(done.stdout)


def test_models_compute_the_same_in_a_process_without_flax(tmp_path):
    vit = TinyViT(rngs=nnx.Rngs(0))
    vit.norm.mean[...] = jnp.array([0.1, -0.2, 0.3, 0.4])
    half = half_precision()
    net = LinenNet()
    images = jnp.zeros((2, 8, 8, 3))
    variables = net.init(jax.random.key(0), images, False)
    layer = Layer(jax.random.normal(jax.random.key(1), (3, 5)), jax.nn.gelu)
    vit.eval()
    half.eval()
    cases = {
        "vit": (vit, None),
        "half": (half, None),
        "linen": (lambda params, x: net.apply(params, x, False), variables),
        "tree": (layer, None),
    }
    for name, (model, params) in cases.items():
        serving.export(model, tmp_path / name, images, params=params)
    paths = [tmp_path / name for name in cases]
    inputs, outputs, heavy = serve_elsewhere(paths, [(8, 8, 3)] * 4, (1, 3, 8))
    assert heavy == []
    for path in paths:
        model, params = cases[path.name]
        call = jax.jit(model if params is None else functools.partial(model, params))
        for size, x in inputs[path].items():
            got = outputs[path][size]
            assert got.shape[0] == int(size)
            assert np.ptp(got) > 1e-3
            tolerance = 2e-2 if path.name == "half" else 1e-5
            np.testing.assert_allclose(got, call(x), tolerance, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (lambda rngs: models.resnet(50, rngs=rngs), 25_557_032 + 2 * 26_560),
        (lambda rngs: models.vit_b16(rngs=rngs), 86_567_656),
    ],
    ids=["resnet50", "vit_b16"],
)
def test_networks_of_imagenet(tmp_path, build, parameters):
    model = build(nnx.Rngs(0))
    model.eval()
    path = tmp_path / "model"
    serving.export(model, path, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    served = serving.load(path)
    assert served.num_parameters == parameters
    assert served.platforms == ("cpu", "cuda", "tpu")
    inputs, outputs, heavy = serve_elsewhere([path], [(224, 224, 3)], (1, 3, 8))
    assert heavy == []
    path.unlink()  # it has hundreds of megabytes
    call = jax.jit(model)
    for size, x in inputs[path].items():
        wanted = call(x)
        assert np.ptp(wanted) > 1e-3
        np.testing.assert_allclose(outputs[path][size], wanted, 1e-4, 1e-4)
