"""Every config builds, can be overridden, and trains for a few steps as `:smoke`."""

import dataclasses
import pathlib
import sys

import generated_images
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from flax import nnx
from ml_collections import config_flags

from configs import base, recipes
from experiments import build, data, train
from experiments.state import prepare
from sparsejax.masks.layout import named_leaves

pytestmark = pytest.mark.filterwarnings(
    "ignore:the load_module:DeprecationWarning"  # called by ml_collections
)

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted(
    path
    for path in (ROOT / "configs").glob("*.py")
    if path.stem not in ("__init__", "base", "recipes")
)
PAPERS = [path for path in CONFIGS if "recipes" in path.read_text()]
QUICK = ("imagenet_srigl_vit",)
IMAGES = {
    "digits": ((8, 8, 1), 10),
    "fashion_mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "imagenet2012": ((224, 224, 3), 1000),
}

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def fake(config):
    """Return a dataset of the sizes that a config asks for, of noise."""
    shape, num_classes = IMAGES[config.name]
    if config.image_size:
        shape = (config.image_size, config.image_size, 3)
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(40, *shape), dtype=np.uint8)
    labels = rng.integers(num_classes, size=40, dtype=np.int32)
    split = data.Split(images, labels)
    moments = np.full(shape[-1], 128, np.float32)
    return data.Dataset(config, split, split, num_classes, moments, moments)


@pytest.fixture
def parse(monkeypatch):
    """A function (path, *overrides) -> config, as the command line does it."""

    def parse(path, *overrides):
        arguments = ["program", f"--config={path}", *overrides]
        monkeypatch.setattr(sys, "argv", arguments)  # where overrides are looked up
        values = flags.FlagValues()
        holder = config_flags.DEFINE_config_file("config", flag_values=values)
        values(arguments)
        return holder.value

    return parse


@each_config
def test_every_config_builds_and_can_be_overridden(path, parse):
    config = parse(
        path,
        "--config.sparse.sparsity=0.5",
        "--config.sparse.method=static",
        "--config.model.widths=(7, 6)",
        "--config.num_steps=400000",
        "--config.data.data_dir=somewhere",
    )
    assert config.sparse.sparsity == 0.5
    assert config.sparse.method == "static"
    assert config.model.widths == (7, 6)
    assert (config.num_steps, config.data.data_dir) == (400_000, "somewhere")

    assert parse(path) == parse(path)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = prepare(config, fake(config.data), device).abstract["model"]
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) > 500


def test_unknown_and_ill_typed_fields_are_refused(parse):
    path = ROOT / "configs" / "digits_rigl.py"
    with pytest.raises(KeyError, match="sparsty not found"):
        parse(path, "--config.sparse.sparsty=0.5")
    with pytest.raises(flags.IllegalFlagValueError, match="num_steps=many"):
        parse(path, "--config.num_steps=many")


@pytest.mark.parametrize(
    ("name", "parameters", "sparse", "stop_at"),
    [
        ("cifar10_srigl", 11_173_962, 11_164_352, 73_125),
        ("cifar10_srigl_wrn", 1_079_642, 1_076_912, 73_125),
        ("cifar100_chase", 23_705_252, 23_652_032, 80_000),
        ("cifar100_chase_vgg", 20_086_692, 20_070_080, 80_000),
        ("imagenet_chase", 25_557_032, 25_502_912, 250_200),
        ("imagenet_rigl", 25_557_032, 25_502_912, 25_000),
        ("imagenet_srigl", 25_557_032, 25_502_912, 192_000),
        ("imagenet_srigl_vit", 86_567_656, 86_292_480, 35_188),
    ],
)
def test_the_networks_and_schedules_are_those_of_the_papers(
    name, parameters, sparse, stop_at, parse
):
    config = parse(ROOT / "configs" / f"{name}.py")
    assert config.sparse.stop_fraction * config.num_steps == pytest.approx(
        stop_at, 1e-4
    )
    static = dataclasses.replace(config.sparse, method="static")
    config = dataclasses.replace(config, sparse=static)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = named_leaves(prepare(config, fake(config.data), device).abstract)
    masks = [leaf for path, leaf in abstract.items() if "/masks/" in path]
    assert sum(mask.size for mask in masks) == sparse
    statistics = ("mean", "var", "count", "key")
    model = {p: x for p, x in abstract.items() if p.startswith("model/")}
    sizes = [x.size for p, x in model.items() if not p.endswith(statistics)]
    assert sum(sizes) == parameters


def test_learning_rates():
    steps = base.Optimizer(
        learning_rate=0.4, warmup_steps=10, decay="steps", at=(30, 50), factor=0.1
    )
    rate = build.schedule(steps, 60)
    expected = {0: 0, 5: 0.2, 10: 0.4, 29: 0.4, 30: 0.04, 49: 0.04, 50: 0.004}
    for step, value in expected.items():
        assert float(rate(step)) == pytest.approx(value), step
    without = build.schedule(dataclasses.replace(steps, warmup_steps=0), 60)
    assert float(without(0)) == pytest.approx(0.4)
    cosine = build.schedule(base.Optimizer(learning_rate=0.4, warmup_steps=10), 60)
    expected = {0: 0, 10: 0.4, 35: 0.2, 60: 0}
    for step, value in expected.items():
        assert float(cosine(step)) == pytest.approx(value, abs=1e-7), step


@pytest.mark.parametrize(
    ("decayed", "expected"),
    [
        ("kernels", {"kernel"}),
        ("all", {"kernel", "bias", "scale", "shift"}),
        ("but_norms", {"kernel", "bias"}),
    ],
)
def test_what_decays(decayed, expected):
    params = {
        "head": {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32)},
        "norm1": {"scale": np.ones(3, np.float32), "shift": np.ones(3, np.float32)},
    }
    optimizer = base.Optimizer(decayed=decayed, weight_decay=0.5, warmup_steps=0)
    config = base.Config(
        optimizer=optimizer, sparse=base.Sparse(method="dense"), num_steps=10
    )
    tx = build.optimizer(config, key=jax.random.key(0))
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    moved = {p for p, x in named_leaves(updates).items() if np.asarray(x).any()}
    assert {path.split("/")[1] for path in moved} == expected


def test_smoke_takes_few_images_of_any_split():
    config = base.Config(data=base.Data(train_split="train[5000:]"))
    smoke = recipes.variant(config, "smoke").data
    assert (smoke.train_split, smoke.test_split) == ("train[:64]", "test[:40]")


def test_the_only_variant_is_smoke():
    with pytest.raises(ValueError, match="only variant of a config is 'smoke', got 'f"):
        recipes.variant(base.Config(), "fast")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path, marks=[] if path.stem in QUICK else pytest.mark.slow, id=path.stem
        )
        for path in PAPERS
    ],
)
def test_smoke(path, parse, monkeypatch, tmp_path):
    """On JPEG files of all sizes for ImageNet, on noise for CIFAR."""
    config = parse(f"{path}:smoke")
    if config.data.name == "imagenet2012":
        config.data.data_dir = str(generated_images.imagenet(tmp_path, 64, 40))
    else:
        monkeypatch.setattr(data, "load", fake)
    check_smoke(config, tmp_path / "run")


def test_smoke_on_mocked_images(parse, tmp_path):
    config = parse(f"{ROOT / 'configs' / 'imagenet_srigl_vit.py'}:smoke")
    config.data.data_dir = str(generated_images.imagenet(tmp_path, 64, 40))
    with generated_images.mocked(config.data.data_dir):
        check_smoke(config, tmp_path / "run")


def check_smoke(config, folder):
    last = train.train_and_evaluate(config, folder)
    assert last["step"] == config.num_steps == 8
    assert np.isfinite(last["train/loss"]) and np.isfinite(last["test/loss"])
    # Where so many channels go at once, Chase finds no room for all of its weights.
    live = 1 - config.sparse.channel_sparsity
    most = 1 - live**2 if config.sparse.method == "chase" else 0.5
    assert 0.48 < last["sparsity"] < most + 0.03
    model, _ = train.load(config, folder, best=True)
    assert not [x for x in jax.tree.leaves(nnx.state(model)) if isnan(x)]


def isnan(x):
    return jnp.issubdtype(x.dtype, jnp.floating) and not jnp.isfinite(x).all()
