"""The same run on any number of devices, and moved from one number to another."""

import signal

import jax
import numpy as np
import pytest
import small_runs
from jax.sharding import PartitionSpec as P

from experiments import data, mesh, preemption, train
from experiments.state import prepare
from sparsejax.masks.layout import named_leaves

CONFIG = small_runs.wide_mlp()
TOPOLOGIES = {1: 1, 2: 1, 4: 2, 8: 2}  # devices: fsdp

slow = pytest.mark.slow


def train_on(devices, folder, monkeypatch, *, stop_at=None):
    config = small_runs.wide_mlp(fsdp=TOPOLOGIES[devices])
    with monkeypatch.context() as patch:
        small_runs.use_devices(patch, devices)
        if stop_at is None:
            train.train_and_evaluate(config, folder)
            return
        small_runs.signal_at(patch, stop_at, signal.SIGTERM)
        with pytest.raises(preemption.Preempted):
            train.train_and_evaluate(config, folder)


@pytest.fixture(scope="module")
def on_one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        train_on(1, folder, patch)
    return folder


@pytest.mark.parametrize(
    "devices", [8, pytest.param(2, marks=slow), pytest.param(4, marks=slow)]
)
def test_the_same_run_on_several_devices(devices, on_one, tmp_path, monkeypatch):
    train_on(devices, tmp_path, monkeypatch)
    small_runs.check_alike(CONFIG, tmp_path, on_one)


@pytest.mark.parametrize(
    "path",
    [[(8, 10), (1, None)], pytest.param([(8, 5), (4, 13), (1, None)], marks=slow)],
)
def test_a_run_that_moves_to_fewer_devices(path, on_one, tmp_path, monkeypatch):
    for devices, stop_at in path:
        train_on(devices, tmp_path, monkeypatch, stop_at=stop_at)
    small_runs.check_alike(CONFIG, tmp_path, on_one)


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_every_device_count_tests_every_image_once(devices, on_one, monkeypatch):
    """The 360 test images fill three batches of 104 and a part of a fourth."""
    small_runs.use_devices(monkeypatch, devices)
    dataset, devices = data.load(CONFIG.data), mesh.make()
    seen = np.zeros(10)
    for batch in dataset.eval_batches(CONFIG.eval_batch_size):
        batch = jax.device_get(mesh.to_devices(devices, batch))
        np.add.at(seen, batch["label"], batch["weight"])
    np.testing.assert_array_equal(seen, np.bincount(dataset.test.labels))


@pytest.mark.parametrize(
    ("shape", "fsdp", "expected"),
    [
        ((512, 512), 4, P("fsdp")),
        ((512, 1024), 4, P(None, "fsdp")),
        ((3, 3, 256, 512), 2, P(None, None, None, "fsdp")),
        ((3, 3, 512, 510), 4, P(None, None, "fsdp")),
        ((513, 511), 2, P()),
        ((4096,), 8, P("fsdp")),
        ((4095,), 5, P()),
        ((512, 512), 1, P()),
        ((), 4, P()),
    ],
)
def test_the_rule(shape, fsdp, expected):
    assert mesh.partition(shape, fsdp) == expected


def test_weights_masks_and_slots_lie_alike():
    training = prepare(CONFIG, data.load(CONFIG.data), mesh.make(2))
    specs = {p: x.sharding.spec for p, x in named_leaves(training.abstract).items()}
    cut = {path for path, spec in specs.items() if spec != P()}
    kernels = {path for path in specs if path.endswith("layers/0/kernel")}
    budgets = {path for path in kernels if "/budgets/" in path}
    assert cut == kernels - budgets and len(cut) == 3  # weight, mask, momentum


def test_joining_nobody_says_what_is_missing(monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ValueError, match="neither a TPU pod .*--coordinator=HOST:PORT"):
        mesh.join_processes()
