import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from configs import base
from experiments import (
    data,
    fit,
    kept_runs,
    lottery_masks,
    lottery_measure,
    lottery_report,
    lottery_runs,
)
from experiments.lottery_train import Asked, Trainer
from sparsejax import lottery

CONFIG = base.Lottery(
    model=base.Model(name="resnet_cifar", depth=8, width=20, stem_strides=2),
    sparse=base.Sparse(method="static"),
    optimizer=base.Optimizer(warmup_steps=2),
    num_steps=4,
    batch_size=16,
    log_every=2,
    eval_batch_size=120,
    rounds=2,
    rate=0.6,
    rewind_fraction=0.25,
    groups=2,
)
BRANCHES = ["refill", "regroup", "refill-reinit", "random"]
RUNS = lottery_runs.runs(BRANCHES, CONFIG.rounds, num_seeds=1)
# Of the convolutions but the stem's.
SIZE = 20 * 20 * 18 + 40 * 20 * 10 + 40 * 40 * 9 + 80 * 40 * 10 + 80 * 80 * 9


@pytest.fixture(scope="module")
def dataset():
    return data.load(CONFIG.data)


@pytest.fixture(scope="module")
def train_missing(dataset, tmp_path_factory):
    """A function that trains what a folder lacks, with one compiled step."""
    folder = tmp_path_factory.mktemp("runs")
    trainer = Trainer(CONFIG, dataset, folder)
    runs = {run.name: run for run in RUNS}
    return lambda: (
        kept_runs.train_missing(folder, CONFIG, runs, trainer.train) or folder
    )


@pytest.fixture(scope="module")
def workdir(train_missing):
    return train_missing()


@pytest.fixture(scope="module")
def trained(workdir):
    runs = lottery_runs.read(workdir, RUNS)
    return {(run["round"], run["branch"]): run for run in runs}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_have_all_runs_once_and_need_little_of_one_another(count):
    asked = lottery_runs.runs(BRANCHES, rounds=5, num_seeds=3)
    assert len(asked) == len(set(asked)) == 3 * (6 + 1 + 5 * 4)
    parts = [lottery_runs.part(asked, f"{index}/{count}") for index in range(count)]
    assert sorted(run for part in parts for run in part) == sorted(asked)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= len(BRANCHES)
    rounds_done = {}  # by seed and round, when it is, if all runs take as long
    for part in parts:
        for time, run in enumerate(part):
            if run.branch == "imp":
                assert run.round == 0 or (run.seed, run.round - 1) in rounds_done
                rounds_done[run.seed, run.round] = time
    for part in parts:
        for time, run in enumerate(part):
            if run.branch != "imp":
                assert rounds_done[run.seed, run.round] < time


def test_branches_that_are_none_are_refused():
    lottery_runs.runs(["regroup-exact", "regroup-random-reinit"], 2, 2)
    with pytest.raises(ValueError, match="must be one of refill, .* got 'refil'"):
        lottery_runs.runs(["refil"], 2, 2)


def test_branches_of_one_round_share_its_groups():
    rng = np.random.default_rng(0)
    mask = rng.random((3, 3, 8, 60)) < np.where(np.arange(60) < 30, 0.1, 0.4)
    pruned = lottery.Round(1, {"kernel": mask, "bias": None}, None, None)
    channels: Any = None  # which only refilling looks at
    finder = lottery_masks.Finder(CONFIG, channels)
    found = {
        branch: finder.find(branch, pruned, None, seed=3)
        for branch in lottery_masks.BRANCHES
        if not branch.startswith("refill")
    }
    groups = {b: one.assignments["kernel"] for b, one in found.items() if b != "random"}
    np.testing.assert_array_equal(groups["regroup-exact"], groups["regroup"])
    at_random = groups.pop("regroup-random")
    assert np.bincount(at_random).tolist() == [30, 30]
    assert (at_random != groups["regroup"]).any()
    masks = {branch: one.masks["kernel"] for branch, one in found.items()}
    assert masks["regroup-exact"].sum() < masks["regroup"].sum()
    # The rows of one group have no columns in common. They are partitioned again, into
    # groups that are too small.
    expected = np.zeros_like(mask)
    for group in (0, 1):
        rows = groups["regroup"] == group
        expected[..., rows] = mask[..., rows].mean(axis=-1, keepdims=True) >= 0.5
    np.testing.assert_array_equal(masks["regroup-count"], expected)
    kept = expected.any(axis=(0, 1, 2))
    assert 0 < kept.sum() < 60
    np.testing.assert_array_equal(groups["regroup-count"] < 2, kept)
    np.testing.assert_array_equal(
        groups["regroup-count"][kept], groups["regroup"][kept]
    )
    assert masks["random"].sum() == mask.sum() and (masks["random"] != mask).any()


def test_rounds_prune_the_same_part_of_what_is_left(trained):
    active = [trained[index, "imp"]["active"] for index in range(3)]
    assert active[0] == trained[0, "imp"]["size"] == SIZE
    assert active[1] == SIZE - round(0.6 * SIZE)
    assert active[2] == active[1] - round(0.6 * active[1])
    for index in (1, 2):
        assert trained[index, "random"]["active"] == active[index]
        assert trained[index, "imp"]["structured_fraction"] == 0
    assert trained[0, "dense-rewound"]["active"] == SIZE
    assert trained[0, "dense-rewound"]["test_loss"] != trained[0, "imp"]["test_loss"]


def test_refilled_tickets_have_whole_channels(workdir, trained):
    for index in (1, 2):
        run = trained[index, "refill"]
        # The first block writes into the stem's channels, which are not pruned.
        assert run["structured_fraction"] == pytest.approx(1 - 20 * 20 * 9 / SIZE)
        with np.load(workdir / f"{run['name']}.npz") as arrays:
            masks = {path: arrays[f"masks/{path}"] for path in run["structured"]}
            weights = {path: arrays[f"model/{path}"] for path in run["structured"]}
        assert len(masks) == 7
        for path, mask in masks.items():
            inputs, outputs = mask.any(axis=(0, 1, 3)), mask.any(axis=(0, 1, 2))
            np.testing.assert_array_equal(
                mask, np.broadcast_to(np.outer(inputs, outputs), mask.shape)
            )
            assert not weights[path][~mask].any()
            assert weights[path][mask].all()
        again = trained[index, "refill-reinit"]
        assert again["active"] == run["active"]
        assert again["test_loss"] != run["test_loss"]


def test_regrouped_tickets_are_made_of_blocks(workdir, dataset, trained):
    run = trained[2, "regroup"]
    # In the first block groups of 10 rows are too small, and shortcuts have too few
    # columns.
    assert run["structured"] == [
        f"blocks/{block}/conv{conv}/conv/kernel" for block in (1, 2) for conv in (1, 2)
    ]
    loose = 20 * 20 * 18 + 20 * 40 + 40 * 80
    assert run["structured_fraction"] == pytest.approx(1 - loose / SIZE)
    ticket = lottery_runs.load(workdir, CONFIG, dataset, run)
    assert set(ticket.blocks) == set(run["structured"])
    with np.load(workdir / f"{run['name']}.npz") as arrays:
        for path, blocks in ticket.blocks.items():
            mask = arrays[f"masks/{path}"].reshape(-1, arrays[f"masks/{path}"].shape[3])
            assert sum(len(rows) for rows, _ in blocks) == mask.shape[1]
            union = np.zeros_like(mask)
            for rows, columns in blocks:
                union[np.ix_(columns, rows)] = True
            np.testing.assert_array_equal(mask, union)
    assert fit.accuracy(ticket.model, dataset) == pytest.approx(run["test_accuracy"])


def test_what_is_trained_is_not_trained_again(workdir, train_missing):
    names = ("imp-round1-seed0", "imp-round2-seed0", "regroup-round2-seed0")
    paths = [workdir / f"{name}.json" for name in names]
    first = [json.loads(path.read_text()) for path in paths]
    others = {p: p.stat().st_mtime_ns for p in workdir.glob("*.json") if p not in paths}
    # Without its file a run counts as missing, and comes out the same; the checkpoint
    # of a round is taken as it is.
    for path in paths:
        path.unlink()
    train_missing()
    again = [json.loads(path.read_text()) for path in paths]
    without_time = lambda runs: [{**run, "seconds": 0} for run in runs]
    assert without_time(again) == without_time(first)
    assert {path: path.stat().st_mtime_ns for path in others} == others


def test_a_run_whose_round_is_missing_says_so(workdir, dataset):
    asked = [Asked(seed=7, round=1, branch="random")]
    with pytest.raises(ValueError, match="needs imp-round1-seed7, which is not in"):
        lottery_runs.train_missing(workdir, CONFIG, dataset, asked)


def test_what_reaches_the_dense_accuracy():
    dense = np.array([0.8, 0.82, 0.84])  # one standard deviation is 0.02
    assert lottery_report.reaches(np.array([0.80, 0.82, 0.84]), dense) == "strict"
    assert lottery_report.reaches(np.array([0.80, 0.81, 0.80]), dense) == "within std"
    assert lottery_report.reaches(np.array([0.80, 0.79, 0.80]), dense) == "no"
    as_run = lambda accuracy, part: {
        "test_accuracy": accuracy,
        "structured_fraction": part,
    }
    reference = [as_run(accuracy, 0) for accuracy in dense]
    verdict = lambda part: lottery_report.verdict([as_run(0.9, part)] * 3, reference)
    assert [verdict(part) for part in (0.95, 0.9)] == ["strict", "no structure"]


def made_up(trained):
    """Return measured runs of two seeds; the second's accuracy is 2 points higher."""
    forms = dict.fromkeys(trained[1, "refill"]["structured"], "dense")
    times = {"dense": (3e-3,) * 3, "best dense": (2e-3,) * 3, "ticket": (1e-3,) * 3}
    measured = {
        "forms": forms,
        "flops": [25, 100],
        "error": 1e-7,
        "times": times,
        "ratios": {"dense": (3.0, 3, 3), "best dense": (2.0, 2, 2)},
    }
    accuracies = {"imp": 0.8, "refill": 0.83, "regroup": 0.785, "random": 0.5}
    accuracies |= {"dense-rewound": 0.79}
    return [
        run
        | (measured if run["branch"] in lottery_masks.TIMED else {})
        | {
            "seed": seed,
            "test_accuracy": accuracies.get(run["branch"], 0.7) + 0.02 * seed,
        }
        for run in trained.values()
        for seed in (0, 1)
    ]


def cells(text, *begin):
    """Return the cells of the lines of tables that begin with these."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [row for row in rows if tuple(row[: len(begin)]) == begin]


def test_the_report_has_every_setting_and_keeps_its_reading(trained, tmp_path):
    out = tmp_path / "results" / "digits"
    lottery_report.write(out, CONFIG, made_up(trained), command="the command")
    page = out.with_suffix(".md")
    text = page.read_text()
    sparsity = f"{1 - trained[2, 'refill']['active'] / SIZE:.1%}"
    accuracy, time, forms = cells(text, "2", "refill")
    assert accuracy[2:] == [
        sparsity,
        "97%",
        "84.00 ± 12.71",
        "+3.00 ± 0.00",
        "+4.00 ± 0.00",
        "strict",
        "strict",
    ]
    assert time[2:] == [
        sparsity,
        "25.0%",
        "3.00",
        "2.00",
        "1.00",
        "3.00 ± 0.00",
        "2.00 ± 0.00",
        "1e-07",
    ]
    assert forms[2:] == ["dense 2"] * 7
    for reference in ("dense", "dense-rewound"):
        (winner,) = cells(text, "refill", reference)
        assert winner[2:4] == [f"{sparsity} (round 2)", "2.00"]
    # 1.5 points less than the dense network, whose deviation is 1.41, and half a point
    # less than the rewound one.
    (loser,) = cells(text, "regroup", "dense")
    assert loser[2:] == ["none", "", "none", ""]
    (loser,) = cells(text, "regroup", "dense-rewound")
    assert loser[2] == "none" and loser[4].endswith("(round 2)")
    (random,) = cells(text, "1", "random")
    assert random[-2:] == ["no", ""]
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert len(json.loads(out.with_suffix(".json").read_text())["runs"]) == 24

    page.write_text(text + "\n## Reading\n\nWords.\n")
    lottery_report.write(out, CONFIG, made_up(trained), command="the command")
    assert page.read_text().endswith("## Reading\n\nWords.\n")


@pytest.mark.slow
def test_tickets_are_executed_as_what_they_are(workdir, dataset, trained):
    asked = [Asked(0, 2, "refill"), Asked(0, 2, "regroup"), Asked(0, 2, "random")]
    measured = lottery_measure.measure(workdir, CONFIG, dataset, asked, seconds=0.01)
    refill, regroup, random = measured
    assert "times" not in random
    for run in (refill, regroup):
        assert run["error"] < 1e-5
        assert set(run["times"]) == {"dense", "best dense", "ticket"}
        own, dense = run["flops"]
        assert own < dense
    assert set(refill["forms"].values()) <= {"dense", "unfolded"}
    assert set(regroup["forms"]) > set(regroup["structured"])
    before = {p: p.stat().st_mtime_ns for p in (workdir / "measured").iterdir()}
    again = lottery_measure.measure(workdir, CONFIG, dataset, asked, seconds=0.01)
    assert again == measured
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_folder_belongs_to_one_recipe(workdir, dataset):
    other = dataclasses.replace(CONFIG, groups=3)
    with pytest.raises(ValueError, match="config.groups: 2 -> 3"):
        lottery_runs.train_missing(workdir, other, dataset, RUNS)
    more = dataclasses.replace(CONFIG, rounds=3)
    lottery_runs.train_missing(workdir, more, dataset, RUNS)  # has them all
