import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import base
from experiments import build, data, kept_runs, tost_masks, tost_report, tost_runs
from sparsejax.masks.layout import named_leaves

CONFIG = base.ToST(
    model=base.Model(name="resnet_cifar", depth=8, width=4, stem_strides=2),
    optimizer=base.Optimizer(warmup_steps=0, decay="steps", at=(6,), decayed="all"),
    sparse=base.Sparse(method="static"),
    num_steps=8,
    batch_size=32,
    eval_batch_size=120,
    rescale_iterations=2,
    rescale_batch_size=16,
)
CELLS = tost_runs.cells(["magnitude"], [0.5], 1)
ASKED = tost_runs.runs(CELLS, ["vanilla", "all"])


@pytest.fixture(scope="module")
def dataset():
    return data.load(CONFIG.data)


@pytest.fixture(scope="module")
def workdir(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tost_runs.train_missing(folder, CONFIG, dataset, ASKED[:2])
    return folder


def test_every_trick_is_run_with_every_mask_and_the_dense_network_alone():
    cells = tost_runs.cells(tost_masks.SOURCES, [0.9, 0.95, 0.98], 3)
    asked = tost_runs.runs(cells, tost_runs.TRICKS)
    assert len(asked) == 5 * 3 * 6 * 3 + 3
    assert len({run.name for run in asked}) == len(asked)
    shards = [
        tost_runs.runs(kept_runs.part(cells, f"{i}/2"), tost_runs.TRICKS)
        for i in range(2)
    ]
    assert sorted(shards[0] + shards[1]) == sorted(asked)
    assert abs(len(shards[0]) - len(shards[1])) <= 6


def test_tricks_are_parts_of_the_recipe():
    parts = {trick: tost_runs.recipe(CONFIG, trick) for trick in tost_runs.TRICKS}
    assert [how.neurons for how in parts.values()] == [
        *(None, "swish", None, None, None, "swish")
    ]
    assert [how.skips for how in parts.values()] == [0, 0, 1, 0, 0, 1]
    assert [how.ghost_steps for how in parts.values()] == [0, 4, 4, 0, 0, 4]
    assert [how.label_smoothing for how in parts.values()] == [0, 0, 0, 0.1, 0, 0.1]
    assert [how.iterations for how in parts.values()] == [0, 0, 0, 0, 2, 2]


@pytest.mark.parametrize("source", ["dense", *tost_masks.SOURCES])
def test_masks_have_the_sparsity_and_depend_on_the_seed(source, dataset):
    sparsity = 0.0 if source == "dense" else 0.9

    def find(seed):
        model = build.model(CONFIG.model, dataset, key=jax.random.key(seed))
        model.train()
        cell = tost_masks.Cell(source, sparsity, seed)
        return named_leaves(tost_masks.find_masks(cell, model, dataset))

    masks = find(0)
    sizes = {path: mask.size for path, mask in masks.items()}
    active = sum(int(mask.sum()) for mask in masks.values())
    # Each layer of a random mask is rounded by itself.
    assert abs(active - (1 - sparsity) * sum(sizes.values())) <= len(sizes)
    assert list(sizes)[-1] == "stem/conv/kernel" and "head/kernel" in sizes
    if source in ("random", "snip"):
        other = find(1)
        assert any((mask != other[path]).any() for path, mask in masks.items())


def test_each_run_is_trained_and_kept(workdir):
    vanilla, every = tost_runs.read(workdir, ASKED[:2])
    for run in (vanilla, every):
        assert 0 < run["test_accuracy"] < 1
        assert np.isfinite(run["test_loss"]) and np.isfinite(run["train_loss"])
        assert run["active"] == round(run["size"] / 2)
        assert run["seconds"]["plain"] > 0
    assert vanilla["ghost_parameters"] == 0 < every["ghost_parameters"]
    assert vanilla["seconds"]["ghosted"] is None
    assert every["seconds"]["ghosted"] > 0
    assert vanilla["train_loss"] != every["train_loss"]


def test_what_is_trained_is_not_trained_again(workdir, dataset):
    path = workdir / f"{ASKED[0].name}.json"
    before = path.stat().st_mtime_ns
    tost_runs.train_missing(workdir, CONFIG, dataset, ASKED[:2])
    assert path.stat().st_mtime_ns == before
    other = dataclasses.replace(CONFIG, rescale_iterations=3)
    with pytest.raises(ValueError, match="rescale_iterations: 2 -> 3"):
        tost_runs.train_missing(workdir, other, dataset, ASKED[:2])


def test_the_report_pairs_seeds_and_keeps_its_reading(workdir, tmp_path):
    out = tmp_path / "results" / "digits"
    vanilla, every = tost_runs.read(workdir, ASKED[:2])
    accuracies = {"vanilla": (0.8, 0.82), "all": (0.83, 0.83), "dense": (0.9, 0.9)}
    dense = vanilla | {"source": "dense", "sparsity": 0.0}
    runs = [
        run | {"seed": seed, "test_accuracy": accuracies[key][seed]}
        for seed in (1, 0)
        for key, run in (("vanilla", vanilla), ("all", every), ("dense", dense))
    ]
    tost_report.write(out, CONFIG, runs, command="the command")
    page = out.with_suffix(".md")
    text = page.read_text()
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    # Two values that differ by 2 have the standard error 1; t(0.975, 1) is 12.706.
    assert ["50%", "magnitude", "81.00 ± 12.71", "83.00 ± 0.00"] in table
    assert ["0%", "dense", "90.00 ± 0.00", ""] in table
    assert ["50%", "magnitude", "+2.00 ± 12.71"] in table
    assert ["all", "+2.00 ± 12.71", "+2.00 ± 12.71", "2 of 2"] in table
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert len(json.loads(out.with_suffix(".json").read_text())["runs"]) == 6

    page.write_text(text + "\n## Reading\n\nWords.\n")
    tost_report.write(out, CONFIG, runs, command="the command")
    assert page.read_text().endswith("## Reading\n\nWords.\n")
