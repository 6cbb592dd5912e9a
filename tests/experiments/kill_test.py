"""A run that SIGKILL ends at any step ends, resumed, as one that was never stopped."""

import random
import shutil
import signal

import pytest
import small_runs

from experiments import metrics, preemption, report, train
from experiments.checkpoints import FOLDER

CONFIG = small_runs.mlp(log_every=3, eval_every=12, checkpoint_every=7)
LONG = small_runs.mlp(num_steps=400, checkpoint_every=7)


def run(config, folder, **options):
    return small_runs.end(small_runs.start(config, folder, devices=8, **options))


def kill_and_resume(config, folder, steps):
    for step in steps:
        code, errors = run(config, folder, at=step)
        assert code == -signal.SIGKILL, errors
        assert not report.exists(folder)
    code, errors = run(config, folder)
    assert code == 0, errors


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train.train_and_evaluate(CONFIG, folder)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that SIGTERM stopped between two lines and checkpoints."""
    folder = tmp_path_factory.mktemp("stopped")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        small_runs.signal_at(patch, 11, signal.SIGTERM)
        train.train_and_evaluate(CONFIG, folder)
    assert stop.value.code == preemption.EXIT_CODE == 75
    assert signal.getsignal(signal.SIGTERM) is before
    return folder


def test_two_kills(whole, tmp_path):
    kill_and_resume(CONFIG, tmp_path, sorted(random.Random(1).sample(range(1, 32), 2)))
    small_runs.check_same(CONFIG, tmp_path, whole)


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.train_and_evaluate(LONG, whole)
    kill_and_resume(LONG, killed, sorted(random.Random(2).sample(range(1, 400), 20)))
    small_runs.check_same(LONG, killed, whole)


def test_sigterm_saves_the_run(whole, stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "copy")
    assert small_runs.arrays(CONFIG, folder)["optimizer/step"] == 11
    assert [line["step"] for line in metrics.read(folder)] == [3, 6, 9]
    train.train_and_evaluate(CONFIG, folder)
    small_runs.check_same(CONFIG, folder, whole)


@pytest.mark.usefixtures("abandoned_reads")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_goes_on_from_before_a_damaged_checkpoint(whole, stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "copy")
    shutil.rmtree(folder / FOLDER / "11" / "state")
    with pytest.raises(ValueError, match="(?s)11 cannot be restored.*resume_from=7"):
        train.train_and_evaluate(CONFIG, folder)
    assert [line["step"] for line in metrics.read(folder)] == [3, 6, 9]
    train.train_and_evaluate(CONFIG, folder, resume_from=7)
    small_runs.check_same(CONFIG, folder, whole)
    assert (folder / f"{FOLDER}_set_aside" / "11.0").exists()


@pytest.mark.slow
def test_the_exit_code_of_a_process(tmp_path):
    code, errors = run(CONFIG, tmp_path, at=11, by=signal.SIGTERM)
    assert code == preemption.EXIT_CODE, errors
