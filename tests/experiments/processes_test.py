"""Several processes on one machine: the run of one, or an end within a minute."""

import signal
import socket

import pytest
import small_runs

from experiments import preemption, report, train
from experiments.checkpoints import FOLDER

CONFIG = small_runs.wide_mlp(checkpoint_every=6)

slow = pytest.mark.slow


def start(count, folder, *, devices=1, at=None, by=signal.SIGKILL, who=()):
    """Start a run in several processes, some of which send themselves a signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        small_runs.start(
            CONFIG,
            folder,
            devices=devices,
            at=at if number in who else None,
            by=by,
            process=(address, count, number),
        )
        for number in range(count)
    ]


def end(started):
    try:
        return [small_runs.end(run) for run in started]
    finally:
        for child, _ in started:
            child.kill()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run in one process on one device."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        small_runs.use_devices(patch, 1)
        train.train_and_evaluate(CONFIG, folder)
    return folder


@pytest.mark.parametrize(
    ("count", "devices"),
    [(2, 1), pytest.param(2, 2, marks=slow), pytest.param(4, 1, marks=slow)],
)
def test_the_run_of_one_process(count, devices, alone, tmp_path):
    for code, errors in end(start(count, tmp_path, devices=devices)):
        assert code == 0, errors
    small_runs.check_alike(CONFIG, tmp_path, alone)


@slow
@pytest.mark.parametrize("who", [0, 1])
def test_where_one_is_killed_the_others_end_and_a_restart_goes_on(who, alone, tmp_path):
    started = start(2, tmp_path, at=15, who=[who])
    (victim, _), (survivor, _) = started[who], started[1 - who]
    victim.wait(240)
    survivor.wait(60)
    codes = [code for code, _ in end(started)]
    assert codes[who] == -signal.SIGKILL
    assert codes[1 - who] not in (0, preemption.EXIT_CODE)
    assert not report.exists(tmp_path)
    steps = {path.name for path in (tmp_path / FOLDER).iterdir()}
    assert {name for name in steps if name.isdigit()} <= {"6", "12"}
    for code, errors in end(start(2, tmp_path)):
        assert code == 0, errors
    small_runs.check_alike(CONFIG, tmp_path, alone)


@slow
def test_where_one_is_preempted_all_save_the_same_step(alone, tmp_path):
    """What two processes began, one finishes."""
    results = end(start(2, tmp_path, at=9, by=signal.SIGTERM, who=[1]))
    for code, errors in results:
        assert code == preemption.EXIT_CODE, errors
    with pytest.MonkeyPatch.context() as patch:
        small_runs.use_devices(patch, 1)
        train.train_and_evaluate(CONFIG, tmp_path)
    small_runs.check_alike(CONFIG, tmp_path, alone)
