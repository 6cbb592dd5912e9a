import contextlib
import dataclasses
import io
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from configs import base
from experiments import compact_demo, data, demo_run, metrics, report, seeds
from sparsejax import serving

ROOT = pathlib.Path(__file__).parents[2]
DEMO = demo_run.Demo(
    base.Config(
        model=base.Model(widths=(12,)),
        sparse=base.Sparse(sparsity=0.8, update_every=4),
        optimizer=base.Optimizer(warmup_steps=2),
        num_steps=16,
        batch_size=32,
        eval_batch_size=360,
    ),
    num_seeds=2,
    compact=compact_demo.Plan(channel_sparsity=0.5, num_steps=4, seconds=0.01),
)
SIZE = 64 * 12 + 12 * 10


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished demo, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "finished"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        demo_run.run(DEMO, folder)
    return folder, printed.getvalue()


def rows(text):
    """The cells of the table of methods, by method."""
    lines = [line.strip("| ").split("|") for line in text.splitlines() if "|" in line]
    cells = [[cell.strip() for cell in line] for line in lines]
    return {name: rest for name, *rest in cells if name in demo_run.METHODS}


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_the_table_says_what_was_trained(finished):
    folder, printed = finished
    table = rows(printed)
    assert tuple(table) == demo_run.METHODS
    assert rows((folder / report.FILE_NAME).read_text()) == table
    last = metrics.read(folder)[-1]
    for method, (accuracy, active, sparsity, milliseconds, cost) in table.items():
        mean = 100 * last[f"{method}/test/accuracy"]
        assert re.fullmatch(rf"{mean:.2f} ± \d+\.\d\d", accuracy)
        kept = round(SIZE * (1 - last[f"{method}/sparsity"]))
        assert active == f"{kept} of {SIZE}"
        assert sparsity == f"{1 - kept / SIZE:.2%}"
        assert last[f"{method}/sparsity"] == pytest.approx(
            0 if method == "dense" else 0.8, abs=2e-3
        )
        assert float(milliseconds) > 0
        assert re.fullmatch(r"\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)", cost)
    assert table["dense"][-1] == "1.00 (1.00 to 1.00)"


def test_a_demo_says_where_everything_is(finished):
    folder, printed = finished
    text = (folder / report.FILE_NAME).read_text()
    for name in ("training", "layers", "masks", "connections"):
        assert f"![{name}]({name}.png)" in text
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert f"Everything is in {folder}:" in printed
    for name in (report.FILE_NAME, metrics.FILE_NAME, "checkpoint"):
        assert name in printed
        assert (folder / name).exists()
    assert [line["step"] for line in metrics.read(folder)] == [4, 8, 12, 16]


def test_the_checkpoint_holds_the_trained_networks(finished):
    folder, _ = finished
    trainings = seeds.Trainings(
        DEMO.config_of("rigl"), data.load(base.Data("digits")), DEMO.num_seeds
    )
    loaded = ocp.load_checkpointables(
        str(folder / "checkpoint"), {"state": trainings.abstract}
    )
    accuracy = metrics.read(folder)[-1]["rigl/test/accuracy"]
    assert trainings.accuracies(loaded["state"]).mean() == pytest.approx(accuracy)
    assert trainings.accuracies(trainings.state).mean() != pytest.approx(accuracy)


def test_a_demo_ends_with_small_networks(finished):
    folder, printed = finished
    text = (folder / report.FILE_NAME).read_text()
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert all(line in text for line in lines)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    (sparse, small_sparse, _, masked, small, trained_on), *_ = (
        [row[1:] for row in cells[i + 2 :][:6]]
        for i, (name, *_) in enumerate(cells)
        if name == "network"
    )
    # What is cut off has gone, and what the networks get right is the same.
    assert sparse[:2] == masked[:2] == ["12", f"{SIZE + 22:,}"]
    assert small[:3] == ["6", f"{65 * 6 + 70:,}", f"{2 * 74 * 6:,}"]
    assert small[3] == masked[3] and small_sparse[3] == sparse[3]
    assert trained_on[:3] == small[:3]
    served = serving.load(folder / "compacted.safetensors")
    digits = data.load(base.Data("digits"))
    predicted = np.asarray(served(digits.normalize(digits.test.images))).argmax(-1)
    accuracy = f"{np.mean(predicted == digits.test.labels):.2%}"
    (of_file,) = (row for row in cells if row[0] == "compacted.safetensors")
    assert of_file[2] == trained_on[3] == accuracy
    size = (folder / "compacted.safetensors").stat().st_size
    assert of_file[1] == f"{size:,}"
    assert served.num_parameters == 65 * 6 + 70


def test_serving_imports_no_flax(finished, monkeypatch, capfd):
    folder, _ = finished
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    compact_demo.serve(folder, data.load(base.Data("digits")), seconds=0)
    imported = capfd.readouterr().err
    assert "sparsejax.serving" in imported
    assert "flax" not in imported


def test_a_finished_demo_is_left_alone(finished, capsys):
    folder, _ = finished
    before = contents(folder)
    demo_run.run(DEMO, folder)
    assert re.search(
        r"holds a finished demo, and nothing was changed: read report.md there\. .* "
        r"remove the folder or choose another one with --workdir",
        capsys.readouterr().out,
    )
    assert contents(folder) == before


def test_another_demo_is_refused_and_nothing_is_overwritten(finished):
    folder, _ = finished
    before = contents(folder)
    with pytest.raises(ValueError, match="config.num_seeds: 2 -> 3"):
        demo_run.run(dataclasses.replace(DEMO, num_seeds=3), folder)
    assert contents(folder) == before


def test_an_unfinished_demo_is_begun_again(finished, tmp_path):
    folder, _ = finished
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    (again / report.FILE_NAME).unlink()
    demo_run.run(DEMO, again)
    assert (again / report.FILE_NAME).exists()
    lines = (folder / metrics.FILE_NAME).read_bytes()
    assert (again / metrics.FILE_NAME).read_bytes() == lines


@pytest.mark.slow
def test_the_command_line(tmp_path):
    command = [sys.executable, "experiments/demo.py", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    accuracy = {
        method: float(row[0].split()[0]) for method, row in rows(done.stdout).items()
    }
    assert accuracy["dense"] > accuracy["rigl"] > accuracy["static"] > 95
