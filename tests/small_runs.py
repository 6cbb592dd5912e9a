"""Runs of the training loop that are small enough for tests, and their comparison."""

import functools
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest

from configs import base
from experiments import data, mesh, metrics, preemption
from experiments.checkpoints import Checkpoints
from experiments.state import prepare
from sparsejax.masks.layout import named_leaves

ROOT = pathlib.Path(__file__).parents[1]


def mlp(**fields):
    """Build a config: 32 steps of RigL on the digits, masks changing every fourth."""
    return base.Config(
        **{
            "model": base.Model(widths=(16,)),
            "sparse": base.Sparse(sparsity=0.8, update_every=4, stop_fraction=1.0),
            "optimizer": base.Optimizer(warmup_steps=5),
            "num_steps": 32,
            "batch_size": 64,
            "eval_batch_size": 104,
            "log_every": 4,
            "eval_every": 16,
            "checkpoint_every": 8,
        }
        | fields
    )


def wide_mlp(**fields):
    """Build a shorter run of a wider network, large enough to be cut over `fsdp`."""
    wide = {"model": base.Model(widths=(96,)), "num_steps": 24, "eval_every": 12}
    return mlp(**wide | fields)


def arrays(config, folder, step=None):
    """Return every array of a checkpoint by path: all that a run consists of."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    training = prepare(config, data.load(config.data), device)
    with Checkpoints(folder) as checkpoints:
        _, state, _ = checkpoints.restore(training.abstract, step)
    return named_leaves(jax.device_get(state))


def check_same(config, found, expected):
    """Check that two folders hold the same run, bit for bit."""
    assert metrics.read(found) == metrics.read(expected)
    theirs, ours = arrays(config, expected), arrays(config, found)
    assert theirs.keys() == ours.keys()
    for path, array in theirs.items():
        np.testing.assert_array_equal(ours[path], array, err_msg=path, strict=True)


def check_alike(config, found, expected):
    """Check that two runs have the same masks; and but for rounding the same rest."""
    pairs = zip(metrics.read(found), metrics.read(expected), strict=True)
    for mine, other in pairs:
        assert mine == pytest.approx(other, rel=1e-4)
    theirs, ours = arrays(config, expected), arrays(config, found)
    assert theirs.keys() == ours.keys()
    for path, array in theirs.items():
        if array.dtype == np.float32:
            np.testing.assert_allclose(ours[path], array, 1e-3, 1e-5, err_msg=path)
        else:
            np.testing.assert_array_equal(ours[path], array, err_msg=path, strict=True)


def use_devices(monkeypatch, count):
    """Let the runs of this process see so many devices."""
    make = functools.partial(mesh.make, devices=jax.devices()[:count])
    monkeypatch.setattr(mesh, "make", make)


def signal_at(monkeypatch, step, number):
    """Let this process send itself a signal when a run has done a step."""
    must_stop = preemption.Watch.must_stop

    def signalled(watch, now):
        if now == step:
            os.kill(os.getpid(), number)
        return must_stop(watch, now)

    monkeypatch.setattr(preemption.Watch, "must_stop", signalled)


# A run in a process of its own, which may send itself a signal after a step.
_PROGRAM = """
import pickle, sys
import jax

run = pickle.load(sys.stdin.buffer)
jax.config.update("jax_num_cpu_devices", run["devices"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

import pytest
import small_runs
from experiments import mesh, train

if run["process"]:
    mesh.join_processes(*run["process"])
small_runs.signal_at(pytest.MonkeyPatch(), run["at"], run["by"])
train.train_and_evaluate(run["config"], run["folder"])
"""


def start(config, folder, *, at=None, by=signal.SIGKILL, devices=1, process=()):
    """Start a run in a process of its own.

    Args:
      config: of the run.
      folder: of the run.
      at: the step after which the process sends itself the signal `by`.
      by: the signal.
      devices: of the process.
      process: what `mesh.join_processes` takes.
    """
    errors = tempfile.TemporaryFile()
    child = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "tests"),
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=errors,
    )
    run = dict(config=config, folder=str(folder), at=at, by=by)
    pickle.dump(run | dict(devices=devices, process=process), child.stdin)
    child.stdin.close()
    return child, errors


def end(started, timeout=240):
    """Wait for a run of `start`; return its exit code and what it wrote to stderr."""
    child, errors = started
    with child, errors:
        try:
            child.wait(timeout)
        finally:
            child.kill()
        errors.seek(0)
        return child.returncode, errors.read().decode()
