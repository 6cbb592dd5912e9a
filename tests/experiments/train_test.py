import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from flax import nnx
from ml_collections import config_flags

from configs import base
from experiments import build, data, metrics, report, train
from experiments.state import prepare
from sparsejax import models

pytestmark = pytest.mark.filterwarnings(
    "ignore:the load_module:DeprecationWarning"  # called by ml_collections
)

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted(
    p for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "base")
)

MLP = base.Config(
    model=base.Model(widths=(16,)),
    sparse=base.Sparse(sparsity=0.8, update_every=4, stop_fraction=1.0),
    optimizer=base.Optimizer(warmup_steps=5),
    num_steps=32,
    batch_size=64,
    eval_batch_size=104,
    log_every=4,
    eval_every=16,
    checkpoint_every=8,
)
RESNET = dataclasses.replace(
    MLP,
    model=base.Model(name="resnet", depth=8, width=4),
    optimizer=base.Optimizer(name="adamw", learning_rate=0.01, warmup_steps=5),
    sparse=base.Sparse(method="dense"),
    augment=True,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the MLP, its last line, and what was compiled for it."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, train.train_and_evaluate(MLP, folder)


class Killed(BaseException):
    pass


def run_and_kill(config, folder, monkeypatch, *, at):
    """Train until the line of step `at` is half written."""
    write = metrics.Writer.write

    def write_or_die(self, record, **kwargs):
        if record["step"] == at:
            with (folder / metrics.FILE_NAME).open("a") as file:
                file.write(json.dumps(record)[:20])
            raise Killed
        write(self, record, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Writer, "write", write_or_die)
        with pytest.raises(Killed):
            train.train_and_evaluate(config, folder)


def arrays(config, folder):
    """Every array of the last checkpoint by path: all that a run consists of."""
    path = max((folder / "checkpoints").iterdir(), key=lambda p: int(p.name))
    dataset = data.load(config.dataset)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    training = prepare(config, dataset, device)
    restored = train.ocp.load_checkpointables(str(path), {"state": training.abstract})
    return report.by_path(jax.device_get(restored["state"]))


def one_block(depth, num_classes, *, in_channels, width, shortcut, rngs):
    """Build a network with BatchNorm that compiles in no time."""
    del depth, shortcut
    return models.ResNet(
        (1,), (width,), num_classes, in_channels=in_channels, rngs=rngs
    )


@pytest.mark.parametrize("config", [MLP, RESNET], ids=["mlp", "resnet"])
def test_a_run_that_was_killed_ends_like_one_that_was_not(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr(build.models, "resnet_cifar", one_block)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    last = train.train_and_evaluate(config, whole)

    run_and_kill(config, killed, monkeypatch, at=28)
    assert not report.exists(killed)
    half_way = arrays(config, killed)
    assert half_way["optimizer/step"] == 24
    # What a process that was killed while it saved leaves behind.
    (killed / "checkpoints" / "32.orbax-checkpoint-tmp").mkdir()
    assert train.train_and_evaluate(config, killed) == last

    for name in (metrics.FILE_NAME, report.FILE_NAME, "config.json", "history.png"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    expected, found = arrays(config, whole), arrays(config, killed)
    assert expected.keys() == found.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path, strict=True)
    # Masks, weights and slots moved between the checkpoint and the end.
    for path in expected:
        if path.endswith(("kernel", "mean")) and "budgets" not in path:
            assert (expected[path] != half_way[path]).any(), path


def test_metrics_of_a_run(finished):
    folder, last = finished
    lines = metrics.read(folder)
    assert [line["step"] for line in lines] == list(range(4, 33, 4))
    assert lines[-1] == last
    names = {"step", "train/loss", "train/accuracy", "train/learning_rate"}
    tested = {"test/loss", "test/accuracy", "sparsity"}
    densities = {f"density/layers/{layer}/kernel" for layer in range(2)}
    for line in lines:
        evaluated = line["step"] in (16, 32)
        assert line.keys() == names | (tested | densities if evaluated else set())
    assert last["train/loss"] < lines[0]["train/loss"]
    assert last["test/accuracy"] > 0.5
    assert last["sparsity"] == pytest.approx(0.8, abs=2e-3)


def test_evaluation_is_the_mean_over_all_test_images(finished):
    folder, last = finished
    model, masks = train.load(MLP, folder)
    test = data.load(MLP.dataset).test
    logits = np.asarray(model(data.load(MLP.dataset).normalize(test.images)), float)
    logits -= logits.max(axis=1, keepdims=True)
    right = logits[np.arange(len(test)), test.labels]
    losses = np.log(np.exp(logits).sum(axis=1)) - right
    assert last["test/loss"] == pytest.approx(losses.mean(), rel=1e-4)
    correct = (logits.argmax(axis=1) == test.labels).mean()
    assert last["test/accuracy"] == pytest.approx(correct, abs=1e-6)

    weights = report.by_path(nnx.as_pure(nnx.state(model, nnx.Param)))
    for path, mask in report.by_path(masks).items():
        assert not np.asarray(weights[path])[~np.asarray(mask)].any()
        active = last[f"density/{path}"] * mask.size
        assert np.asarray(mask).sum() == round(active)


def test_report_of_a_run(finished):
    folder, last = finished
    text = (folder / report.FILE_NAME).read_text()
    assert f"**{last['test/accuracy']:.2%}**" in text
    assert re.search(r"\| layers/0/kernel \| 64x16 \| +1024 \|", text)
    for name in ("history", "density", "masks"):
        assert f"![{name}]({name}.png)" in text
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_left_alone(finished, capsys):
    folder, last = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert train.train_and_evaluate(MLP, folder) == last
    assert "finished after 32 steps" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_another_config_is_refused_and_nothing_is_overwritten(finished):
    folder, _ = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    other = dataclasses.replace(MLP, num_steps=64)
    for call in (train.train_and_evaluate, train.load):
        with pytest.raises(ValueError, match="config.num_steps: 32 -> 64"):
            call(other, folder)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_the_training_step_compiles_once(tmp_path, caplog):
    config = dataclasses.replace(MLP, num_steps=8, eval_every=4, checkpoint_every=4)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        train.train_and_evaluate(config, tmp_path)
    compiled = [r.message for r in caplog.records if r.message.startswith("Compiling")]
    for name in ("jit(train_step)", "jit(eval_step)"):
        assert sum(name in message for message in compiled) == 1, name


@pytest.mark.parametrize("method", ["dense", "static", "set", "magnitude"])
def test_every_method_trains(method, tmp_path):
    sparse = dataclasses.replace(MLP.sparse, method=method)
    config = dataclasses.replace(
        MLP, sparse=sparse, num_steps=8, log_every=2, eval_every=2, checkpoint_every=8
    )
    last = train.train_and_evaluate(config, tmp_path)
    sparsities = [line["sparsity"] for line in metrics.read(tmp_path)]
    expected = 0.0 if method == "dense" else 0.8
    assert last["sparsity"] == pytest.approx(expected, abs=2e-3)
    if method == "magnitude":
        assert sparsities[0] < sparsities[-1]
    else:
        assert len(set(sparsities)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eval_every": 6}, "eval_every .* multiple of config.log_every, .* 4, got 6"),
        ({"checkpoint_every": 0}, "checkpoint_every must be a positive .*, got 0"),
        ({"batch_size": 60}, "batch_size .* number of devices, which is 8, got 60"),
        ({"eval_batch_size": 1}, "eval_batch_size .* number of devices, .* 8, got 1"),
        ({"model": base.Model(name="vit")}, "must be 'mlp' or 'resnet', got 'vit'"),
        (
            {"optimizer": base.Optimizer(name="lion", warmup_steps=0)},
            "must be 'sgd' or 'adamw', got 'lion'",
        ),
        ({"num_steps": 5}, r"warmup_steps must lie in \[0, num_steps=5\), got 5"),
        ({"log_every": 0}, "log_every must be at least 1, got 0"),
        ({"sparse": base.Sparse(method="prune")}, "'dense' or one of .* got 'prune'"),
        ({"sparse": base.Sparse(sparsity=1.5)}, r"must lie in \[0, 1\), got 1.5"),
    ],
)
def test_bad_configs_are_refused_before_anything_is_written(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.train_and_evaluate(dataclasses.replace(MLP, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_loading_needs_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="has no checkpoints: train first"):
        train.load(MLP, tmp_path)


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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_and_can_be_overridden(path, parse):
    config = parse(
        path,
        "--config.sparse.sparsity=0.5",
        "--config.sparse.method=static",
        "--config.model.widths=(7, 6)",
        "--config.num_steps=4000",
        "--config.data_dir=somewhere",
    )
    assert config.sparse.sparsity == 0.5
    assert config.sparse.method == "static"
    assert config.model.widths == (7, 6)
    assert (config.num_steps, config.data_dir) == (4000, "somewhere")

    config = parse(path)
    shapes = {"digits": (8, 8, 1), "fashion_mnist": (28, 28, 1), "cifar10": (32, 32, 3)}
    split = data.Split(
        np.zeros((1, *shapes[config.dataset]), np.uint8), np.zeros(1, np.int32)
    )
    moments = np.ones(split.images.shape[-1], np.float32)
    dataset = data.Dataset(config.dataset, split, split, 10, moments, moments)
    train.check(config)
    sizes = {p: a.size for p, a in report.by_path(_abstract(config, dataset)).items()}
    assert sum(sizes.values()) > 10_000
    assert config == parse(path)


def _abstract(config, dataset):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return prepare(config, dataset, device).abstract["model"]


def test_unknown_and_ill_typed_fields_are_refused(parse):
    path = ROOT / "configs" / "digits_rigl.py"
    with pytest.raises(KeyError, match="sparsty not found"):
        parse(path, "--config.sparse.sparsty=0.5")
    with pytest.raises(flags.IllegalFlagValueError, match="num_steps=many"):
        parse(path, "--config.num_steps=many")


def test_the_command_line(tmp_path):
    command = [
        sys.executable,
        "experiments/classify.py",
        "--config=configs/digits_rigl.py",
        f"--workdir={tmp_path / 'run'}",
        "--config.num_steps=4",
        "--config.optimizer.warmup_steps=1",
        "--config.model.widths=(8,)",
    ]
    environment = {**os.environ, "XLA_FLAGS": ""}
    environment.pop("PYTHONPATH", None)
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "step 4: test accuracy" in run.stdout
    assert metrics.read(tmp_path / "run")[-1]["step"] == 4

    refused = subprocess.run(
        [*command, "--config.seed=1"], cwd=ROOT, capture_output=True, text=True
    )
    assert refused.returncode != 0
    assert "config.seed: 0 -> 1" in refused.stderr
