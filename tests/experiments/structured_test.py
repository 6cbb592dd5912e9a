import dataclasses
import json

import numpy as np
import pytest

from configs import base
from experiments import (
    data,
    fit,
    structured_measure,
    structured_report,
    structured_runs,
)
from sparsejax import analysis, compaction

CONFIG = base.Config(
    model=base.Model(widths=(32,)),
    sparse=base.Sparse(initial="variance", update_every=4, remove_every=4),
    optimizer=base.Optimizer(warmup_steps=2),
    num_steps=40,
    batch_size=32,
    log_every=20,
    eval_batch_size=120,
)
RUNS = [
    (sparse, seed)
    for seed in (0, 1)
    for sparse in structured_runs.settings(CONFIG.sparse, ["rigl", "chase"], [0.5])
    if sparse.method == "rigl" or sparse.channel_sparsity == 0.5
]


@pytest.fixture(scope="module")
def dataset():
    return data.load(CONFIG.data)


@pytest.fixture(scope="module")
def workdir(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    # In two parts, as two processes share them.
    structured_runs.train_missing(folder, CONFIG, dataset, RUNS[0::2])
    structured_runs.train_missing(folder, CONFIG, dataset, RUNS[1::2])
    return folder


@pytest.fixture(scope="module")
def measured(workdir, dataset):
    # One of each method: most of the time goes into compiling what is left of it.
    return structured_measure.measure(workdir, CONFIG, dataset, RUNS[:2], seconds=0.01)


def test_settings_are_methods_by_sparsities_and_variants():
    found = structured_runs.settings(
        base.Sparse(), structured_runs.METHODS, [0.9, 0.95, 0.99]
    )
    assert len(found) == 16
    assert len({structured_runs.name(sparse, 0) for sparse in found}) == 16
    assert {s.channel_sparsity for s in found if s.method == "chase"} == {0, 0.3, 0.5}
    assert {(s.gamma, s.sparsity) for s in found if s.method == "srigl"} == {
        (gamma, sparsity) for gamma in (0, 0.3) for sparsity in (0.9, 0.95, 0.99)
    }
    assert [s.sparsity for s in found if s.method == "dense"] == [0]


def test_each_run_is_trained_and_kept(workdir, dataset):
    runs = structured_runs.read(workdir, RUNS)
    assert [(run["sparse"]["method"], run["seed"]) for run in runs] == [
        ("rigl", 0),
        ("chase", 0),
        ("rigl", 1),
        ("chase", 1),
    ]
    for run in runs:
        model = structured_runs.load(workdir, CONFIG, dataset, run)
        assert fit.accuracy(model, dataset) == pytest.approx(run["test_accuracy"])
        assert run["active"] <= run["size"] // 2
        assert run["neurons"]["layers/1/kernel"] == [10, 10]
    assert len({run["train_loss"] for run in runs}) == 4


def test_what_is_trained_is_not_trained_again(workdir, dataset, monkeypatch):
    path = workdir / f"{structured_runs.name(*RUNS[0])}.json"
    before = {p.name: p.stat().st_mtime_ns for p in workdir.iterdir()}
    structured_runs.train_missing(workdir, CONFIG, dataset, RUNS)
    assert {p.name: p.stat().st_mtime_ns for p in workdir.iterdir()} == before

    # Without its last file a run counts as missing, and comes out the same.
    first = json.loads(path.read_text())
    path.unlink()
    structured_runs.train_missing(workdir, CONFIG, dataset, RUNS)
    again = json.loads(path.read_text())
    assert {**again, "seconds": 0} == {**first, "seconds": 0}


def test_a_folder_belongs_to_one_recipe(workdir, dataset):
    other = dataclasses.replace(CONFIG, num_steps=60)
    with pytest.raises(ValueError, match="another config"):
        structured_runs.train_missing(workdir, other, dataset, RUNS)


def test_networks_are_measured_before_and_after_compaction(workdir, dataset, measured):
    image = np.zeros((1, *dataset.image_shape), np.float32)
    for run in measured:
        small, _ = compaction.compact(
            structured_runs.load(workdir, CONFIG, dataset, run), image
        )
        assert run["flops"][1] == analysis.flops(small, image)
        assert fit.accuracy(small, dataset) == pytest.approx(run["test_accuracy"])
        assert run["error"] < 1e-5
        assert set(run["times"]) == set(structured_measure.BATCHES)
    (rigl,), (chase,) = (run["channels"].values() for run in measured)
    assert rigl[1] == chase[1] == 32
    assert chase[0] <= 16
    assert measured[1]["parameters"][1] < measured[1]["parameters"][0]


def test_the_report_has_every_setting_and_keeps_its_reading(measured, tmp_path):
    out = tmp_path / "results" / "digits"
    accuracies = {"rigl": (0.8, 0.82), "chase": (0.83, 0.83)}
    runs = [
        {
            **run,
            "seed": seed,
            "test_accuracy": accuracies[run["sparse"]["method"]][seed],
        }
        for run in measured
        for seed in (0, 1)
    ]
    structured_report.write(out, CONFIG, runs, command="the command")
    page = out.with_suffix(".md")
    text = page.read_text()
    rows = [
        [cell.strip() for cell in line.split("|")]
        for line in text.splitlines()
        if "chase, 50% removed" in line
    ]
    assert len(rows) == 4  # accuracy, time, channels, neurons
    # Two values that differ by 2 have the standard error 1; t(0.975, 1) is 12.706.
    assert rows[0][3:5] == ["83.00 ± 0.00", "+2.00 ± 12.71"]
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert len(json.loads(out.with_suffix(".json").read_text())["runs"]) == 4

    page.write_text(text + "\n## Reading\n\nWords.\n")
    structured_report.write(out, CONFIG, runs, command="the command")
    assert page.read_text().endswith("## Reading\n\nWords.\n")
