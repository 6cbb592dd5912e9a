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
import small_runs
from event_files import scalars
from flax import nnx

from configs import base
from experiments import build, data, metrics, report, train
from sparsejax import models
from sparsejax.masks.layout import named_leaves

pytestmark = pytest.mark.filterwarnings(
    "ignore:the load_module:DeprecationWarning"  # called by ml_collections
)

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted(
    p for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "base")
)

MLP = small_runs.mlp()
# Everything that a run may have beside: norms, an average, parts of a batch.
RESNET = small_runs.mlp(
    model=base.Model(name="resnet_cifar", depth=8, width=8),
    optimizer=base.Optimizer(name="adamw", learning_rate=0.01, warmup_steps=5),
    data=base.Data(augment="crop"),
    label_smoothing=0.1,
    ema_decay=0.9,
    microbatches=2,
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


def one_block(num_classes, *, in_channels, width, rngs):
    """Build a network with BatchNorm that compiles in no time."""
    return models.ResNet(
        (1,), (width,), num_classes, in_channels=in_channels, rngs=rngs
    )


def test_a_run_that_was_killed_ends_like_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setitem(build.NETWORKS, "resnet_cifar", one_block)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    last = train.train_and_evaluate(RESNET, whole)

    run_and_kill(RESNET, killed, monkeypatch, at=20)
    assert not report.exists(killed)
    half_way = small_runs.arrays(RESNET, killed)
    assert half_way["optimizer/step"] == 16
    # What a process that was killed while it saved leaves behind.
    (killed / "checkpoints" / "32.orbax-checkpoint-tmp").mkdir()
    assert train.train_and_evaluate(RESNET, killed) == last

    for name in (metrics.FILE_NAME, report.FILE_NAME, "config.json", "history.png"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    small_runs.check_same(RESNET, killed, whole)
    # Masks, weights and slots moved between the checkpoint and the end.
    finished = small_runs.arrays(RESNET, whole)
    moved = {path for path, x in finished.items() if (x != half_way[path]).any()}
    assert any("/masks/" in path for path in moved)
    for path in finished:
        if path.endswith(("kernel", "mean")) and not re.search("masks|budgets", path):
            assert path in moved
    # The average is under the masks, too, and not what it averages.
    for path, mask in finished.items():
        if "/masks/" in path:
            name = path.split("/masks/")[1]
            average, weight = (finished[f"{x}/{name}"] for x in ("average", "model"))
            assert not average[~mask].any()
            assert (average != weight).any()


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


def test_tensorboard_tells_whether_the_network_waits_for_images(finished):
    folder, _ = finished
    (events,) = (folder / "tensorboard").iterdir()
    shown = scalars(events)
    for step in range(4, 33, 4):
        assert shown["clock/examples_per_second", step] > 0
        assert 0 < shown["clock/waiting_for_data", step] < 1


def test_evaluation_is_the_mean_over_all_test_images(finished):
    folder, last = finished
    model, masks = train.load(MLP, folder)
    test = data.load(MLP.data).test
    logits = np.asarray(model(data.load(MLP.data).normalize(test.images)), float)
    logits -= logits.max(axis=1, keepdims=True)
    right = logits[np.arange(len(test)), test.labels]
    losses = np.log(np.exp(logits).sum(axis=1)) - right
    assert last["test/loss"] == pytest.approx(losses.mean(), rel=1e-4)
    correct = (logits.argmax(axis=1) == test.labels).mean()
    assert last["test/accuracy"] == pytest.approx(correct, abs=1e-6)

    weights = named_leaves(nnx.as_pure(nnx.state(model, nnx.Param)))
    for path, mask in named_leaves(masks).items():
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
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, got 0"),
        ({"batch_size": 60}, "batch_size .* number of devices, which is 8, got 60"),
        ({"eval_batch_size": 1}, "eval_batch_size .* number of devices, .* 8, got 1"),
        ({"batch_size": 72, "microbatches": 2}, "devices times microb.* 16, got 72"),
        ({"microbatches": 0}, "microbatches must be at least 1, got 0"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\), got 1.0"),
        ({"fsdp": 3}, "fsdp must divide the number of devices, .* 8, got 3"),
        ({"dtype": "float16"}, "must be 'float32' or 'bfloat16', got 'float16'"),
        ({"model": base.Model(name="lenet")}, "must be one of .* got 'lenet'"),
        ({"sparse": base.Sparse(initial="zero")}, "'dense', 'variance' or 'std', got"),
        (
            {"optimizer": base.Optimizer(decay="linear", warmup_steps=0)},
            "must be 'cosine' or 'steps', got 'linear'",
        ),
        (
            {"optimizer": base.Optimizer(decayed="biases", warmup_steps=0)},
            r"must be one of \['kernels', 'all', 'but_norms'\], got 'biases'",
        ),
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


def test_the_command_line(tmp_path):
    command = [
        sys.executable,
        "experiments/imagenet.py",
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

    command[1] = "experiments/classify.py"
    refused = subprocess.run(
        [*command, "--config.seed=1"], cwd=ROOT, capture_output=True, text=True
    )
    assert refused.returncode != 0
    assert "config.seed: 0 -> 1" in refused.stderr
