import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from configs import base
from experiments import comparison, comparison_report, data
from sparsejax import distributions, sparse_optax
from sparsejax.masks.layout import named_leaves

ROOT = pathlib.Path(__file__).parents[2]
SHAPES = ((64, 64), (64, 32), (32, 10))
SIZE = sum(map(math.prod, SHAPES))
FIRST = "layers/0/kernel"

CONFIG = base.Config(
    model=base.Model(widths=(64, 32)),
    sparse=base.Sparse(update_every=10),
    optimizer=base.Optimizer(warmup_steps=5),
    num_steps=100,
    batch_size=64,
    log_every=20,
    eval_batch_size=100,
)


def train(method, sparsities, initial="variance", **changes):
    sparse = dataclasses.replace(CONFIG.sparse, method=method)
    config = dataclasses.replace(CONFIG, sparse=sparse, **changes)
    return comparison.train(
        config, data.load(base.Data("digits")), sparsities, 2, initial
    )


@pytest.mark.parametrize("method", ["static", "rigl"])
def test_sparsities_and_seeds_train_side_by_side(method):
    runs = train(method, [0.8, 0.9])
    found = [(run["method"], run["sparsity"], run["seed"]) for run in runs]
    assert found == [(method, s, seed) for s in (0.8, 0.9) for seed in (0, 1)]
    for run in runs:
        kept = distributions.erk({str(s): s for s in SHAPES}, run["sparsity"])
        assert (run["active"], run["size"]) == (sum(kept.values()), SIZE)
        hits = 360 * run["test_accuracy"]
        assert hits == pytest.approx(round(hits))
        assert hits > 150
    assert len({run["train_loss"] for run in runs}) == 4


def test_a_training_does_not_depend_on_what_trains_beside_it():
    alone, beside = train("set", [0.9]), train("set", [0.8, 0.9])[2:]
    for one, other in zip(alone, beside, strict=True):
        assert one["active"] == other["active"]
        # The order of sums may differ.
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=0.05)


def test_the_dense_reference_uses_every_weight():
    first, second = train("dense", [0.0])
    assert first["active"] == first["size"] == SIZE
    assert (first["pixels"], first["neurons"]) == (64, [64, 32])
    assert first["train_loss"] != second["train_loss"]


def test_first_weights_are_as_asked_for():
    def active_weights(initial):
        sparse = dataclasses.replace(CONFIG.sparse, method="static")
        config = dataclasses.replace(CONFIG, sparse=sparse)
        params, opt_state = comparison.first_states(
            config, data.load(base.Data("digits")), [0.9], 2, initial
        )
        masks = named_leaves(sparse_optax.get_masks(opt_state))
        kernel, mask = named_leaves(params)[FIRST], masks[FIRST]
        assert kernel.shape == mask.shape == (1, 2, *SHAPES[0])
        assert bool(((kernel != 0) == mask).all())
        # By their own fan-in, active weights in all have mean squares of 2 / fan-in.
        return np.asarray(kernel * np.sqrt(mask.sum(axis=2, keepdims=True) / 2)), mask

    drawn = {
        initial: active_weights(initial) for initial in ("variance", "std", "dense")
    }
    scale = {name: np.std(kernel[mask]) for name, (kernel, mask) in drawn.items()}
    assert scale["variance"] == pytest.approx(1, rel=0.1)
    assert scale["std"] < 0.8
    assert scale["dense"] < 0.5
    for _, mask in drawn.values():
        np.testing.assert_array_equal(mask, drawn["dense"][1])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="must be 'mlp', got 'resnet_cifar'"):
        train("static", [0.9], model=base.Model(name="resnet_cifar"))
    with pytest.raises(ValueError, match="multiple of log_every=20, got 50"):
        train("static", [0.9], num_steps=50)


def runs_of(method, accuracies, active):
    return [
        {
            "method": method,
            "sparsity": 0.75,
            "seed": seed,
            "test_accuracy": accuracy,
            "train_loss": 0.5,
            "active": active,
            "size": 100,
            "pixels": 8,
            "share_on_varied_pixels": 0.5,
            "neurons": [6, 4],
            "minutes": 1.0,
        }
        for seed, accuracy in enumerate(accuracies)
    ]


def test_intervals_are_over_seeds_and_differences_are_paired():
    runs = runs_of("rigl", [0.83, 0.83], 25) + runs_of("static", [0.80, 0.82], 25)
    lines = comparison_report.table(runs).splitlines()[2:]
    static, rigl = ([cell.strip() for cell in line.split("|")] for line in lines)
    # Two values that differ by 2 have the standard error 1; t(0.975, 1) is 12.706.
    assert static[1:5] == ["75.0000%", "static", "81.00 ± 12.71", ""]
    assert rigl[1:5] == ["75.0000%", "rigl", "83.00 ± 0.00", "+2.00 ± 12.71"]


def test_writing_again_keeps_the_reading(tmp_path):
    out = tmp_path / "results" / "digits"
    runs = runs_of("static", [0.80, 0.82], 25)
    write = lambda command: comparison_report.write(
        out, CONFIG, runs, command=command, initial="std"
    )
    write("the first command")
    path = out.with_suffix(".md")
    first = path.read_text()
    assert comparison_report.table(runs) in first
    path.write_text(first + "\n## Reading\n\nThese are the author's words.\n")

    write("the second command")
    second = path.read_text()
    assert second.endswith("\n## Reading\n\nThese are the author's words.\n")
    assert "the second command" in second
    assert "the first command" not in second
    raw = json.loads(out.with_suffix(".json").read_text())
    assert (raw["command"], raw["runs"]) == ("the second command", runs)


@pytest.mark.slow
def test_the_command_repeats_itself(tmp_path):
    def run(name):
        command = [
            sys.executable,
            ROOT / "experiments" / "compare.py",
            f"--config={ROOT / 'configs' / 'digits_rigl.py'}",
            "--config.num_steps=150",
            "--methods=static,rigl",
            "--sparsities=0.95",
            "--seeds=2",
            f"--out={tmp_path / name}",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        runs = json.loads((tmp_path / f"{name}.json").read_text())["runs"]
        return [{k: v for k, v in run.items() if k != "minutes"} for run in runs]

    first = run("first")
    assert [r["method"] for r in first] == ["static"] * 2 + ["rigl"] * 2
    assert run("second") == first
