"""The training loop: from a config and a folder to a trained sparse classifier.

A run can be stopped at any moment, and be asked to stop by SIGTERM. The same call goes
on from the last checkpoint and ends with the same bits as a run that was never stopped;
on other devices, or with other processes, with the same masks.
"""

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from configs import base
from experiments import build, data, mesh, metrics, preemption, report
from experiments.checkpoints import FOLDER, Checkpoints, Notes
from experiments.state import prepare
from experiments.steps import evaluate, make_eval_step, make_train_step
from experiments.workdir import claim


def train_and_evaluate(
    config: base.Config, workdir: str | os.PathLike, *, resume_from: int | None = None
) -> metrics.Record:
    """Train, evaluate and report; go on where an earlier call was stopped.

    Writes `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/` and, at the
    end, `report.md` with its pictures. A finished run is left as it is.

    Args:
      config: the run.
      workdir: its folder, made where it is missing; one that all processes see.
      resume_from: the step to go on from, whose checkpoint must be there; by default
        that of the last one. Later checkpoints are moved aside, and lines of later
        steps are forgotten.

    Returns:
      The last line of `metrics.jsonl`.

    Raises:
      ValueError: where the folder belongs to another config, the dataset is missing,
        a field of the config does not fit, or a checkpoint cannot be restored. Nothing
        is overwritten.
      Preempted: after SIGTERM, when the run is saved; uncaught, it ends the process
        with the exit code 75.
    """
    check(config)
    folder = claim(workdir, config, write=False)
    is_writer = jax.process_index() == 0
    if report.exists(folder):
        last = metrics.read(folder)[-1]
        if is_writer:
            print(f"{folder} holds this run, finished after {last['step']} steps.")
        return last

    # Devices and data.
    devices = mesh.make(config.fsdp)
    dataset = data.load(config.data)
    batches = dataset.train_batches(config.batch_size, seed=config.seed, **mesh.here())

    # Steps.
    training = prepare(config, dataset, devices)
    train_step = make_train_step(training, dataset)
    eval_step = make_eval_step(training, dataset)
    learning_rate = build.schedule(config.optimizer, config.num_steps)

    # From here on the folder is this run's: everything above was in order.
    claim(workdir, config, write=is_writer)
    checkpoints = Checkpoints(folder, keep=config.keep_checkpoints, clean_up=True)
    watch = preemption.Watch()
    with contextlib.closing(batches), checkpoints, watch:
        # State: from a checkpoint, or new.
        restored = checkpoints.restore(training.abstract, resume_from)
        start, state, notes = restored or (0, training.init(), Notes())
        if restored:
            checkpoints.set_aside_after(start)
            batches.set_state(notes.data)
        history: list[Mapping[str, Any]] = [*notes.history]
        best, record, step = notes.best, {}, start

        # Loop.
        writer = metrics.Writer(folder, start, enabled=is_writer)
        progress = tqdm(total=config.num_steps, initial=start, disable=not is_writer)
        with writer, progress:
            logged, logged_at, waited = start, time.perf_counter(), batches.seconds
            for step in range(start + 1, config.num_steps + 1):
                batch = mesh.to_devices(devices, next(batches))
                state, step_metrics = train_step(state, batch)
                history.append(step_metrics)
                progress.update()
                is_last = step == config.num_steps
                if step % config.log_every == 0 or is_last:
                    # The mean over the steps since the last line; the host waits here.
                    record = {"step": step, **_mean(history)}
                    record["train/learning_rate"] = float(
                        np.asarray(learning_rate(step - 1))
                    )
                    seconds = time.perf_counter() - logged_at
                    examples = config.batch_size * (step - logged)
                    clock = {
                        "clock/examples_per_second": examples / seconds,
                        # Near 1 the devices starve: give the data more workers.
                        "clock/waiting_for_data": (batches.seconds - waited) / seconds,
                    }
                    if step % config.eval_every == 0 or is_last:
                        test = dataset.eval_batches(
                            config.eval_batch_size, **mesh.here()
                        )
                        arrays = (mesh.to_devices(devices, batch) for batch in test)
                        record |= evaluate(eval_step, state, arrays)
                        record |= report.densities(training.masks(state))
                        best = _better(record, best)
                    writer.write(record, clock=clock)
                    progress.set_postfix(report.headline(record))
                    history, logged, logged_at = [], step, time.perf_counter()
                    waited = batches.seconds
                must_stop = watch.must_stop(step)
                is_due = step % config.checkpoint_every == 0 or is_last
                if is_due or must_stop or best.get("step") == step:
                    position = batches.get_state()
                    notes = Notes(position, _floats(history), best)
                    checkpoints.save(step, state, notes)
                if must_stop:
                    break

    if step < config.num_steps:
        raise preemption.Preempted(step)
    # Report: the last thing that is written, it makes the run a finished one.
    masks = [training.masks(s) for s in (training.init(), state)]
    first, last = mesh.to_host(devices, masks)
    if is_writer:
        report.write(folder, config, dataset, first, last)
        print(f"The report of the run is {folder / report.FILE_NAME}")
    return record or metrics.read(folder)[-1]


def load(
    config: base.Config, workdir: str | os.PathLike, *, best: bool = False
) -> tuple[nnx.Module, Any]:
    """Load what a run has trained.

    Args:
      config: the run's config.
      workdir: the run's folder.
      best: take the checkpoint with the highest test accuracy, not the last one.

    Returns:
      The model, or its average where the config has one, and the masks (a tree like
      its parameters).

    Raises:
      ValueError: where the folder belongs to another config or has no checkpoint.
    """
    folder = claim(workdir, config, write=False)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    training = prepare(config, data.load(config.data), device)
    if not (folder / FOLDER).exists():
        raise ValueError(f"{folder} has no checkpoints: train first.")
    with Checkpoints(folder) as checkpoints:
        step = checkpoints.best if best else None
        restored = checkpoints.restore(training.abstract, step)
    if restored is None:
        raise ValueError(f"{folder} has no checkpoints: train first.")
    _, state, _ = restored
    return training.tested(state), training.masks(state)


def _floats(history: Sequence[Mapping[str, Any]]) -> list[metrics.Record]:
    return jax.tree.map(float, jax.device_get([*history]))


def _mean(history: Sequence[Mapping[str, Any]]) -> metrics.Record:
    values = _floats(history)
    return {
        f"train/{name}": float(np.mean([value[name] for value in values]))
        for name in values[0]
    }


def _better(record: metrics.Record, best: Mapping[str, float]) -> Mapping[str, float]:
    if best and best["test/accuracy"] >= record["test/accuracy"]:
        return best
    return {name: record[name] for name in ("step", "test/accuracy")}


def check(config: base.Config) -> None:
    """Raise ValueError where fields of a config do not fit one another."""
    names = ("num_steps", "log_every", "checkpoint_every", "keep_checkpoints")
    for name in (*names, "microbatches"):
        if getattr(config, name) < 1:
            raise ValueError(
                f"config.{name} must be at least 1, got {getattr(config, name)}."
            )
    _check_multiple(config, "eval_every", "config.log_every", config.log_every)
    unit, size = "the number of devices", jax.device_count()
    _check_multiple(config, "eval_batch_size", unit, size)
    if config.microbatches > 1:
        unit, size = f"{unit} times microbatches", size * config.microbatches
    _check_multiple(config, "batch_size", unit, size)
    for name in ("label_smoothing", "ema_decay"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(
                f"config.{name} must lie in [0, 1), got {getattr(config, name)}."
            )
    warmup_steps = config.optimizer.warmup_steps
    if not 0 <= warmup_steps < config.num_steps:
        raise ValueError(
            "config.optimizer.warmup_steps must lie in [0, num_steps="
            f"{config.num_steps}), got {warmup_steps}."
        )


def _check_multiple(config: base.Config, name: str, unit: str, size: int) -> None:
    value = getattr(config, name)
    if value < 1 or value % size:
        raise ValueError(
            f"config.{name} must be a positive multiple of {unit}, which is {size}, "
            f"got {value}."
        )
