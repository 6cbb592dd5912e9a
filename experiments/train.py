"""The training loop: from a config and a folder to a trained sparse classifier.

A run can be stopped at any moment. The same call goes on from the last checkpoint
and ends with the same bits as a run that was never stopped.
"""

import functools
import os
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from configs import base
from experiments import build, data, metrics, report
from experiments.state import State, Training, prepare
from experiments.workdir import claim

_CHECKPOINTS = "checkpoints"


def train_and_evaluate(
    config: base.Config, workdir: str | os.PathLike
) -> metrics.Record:
    """Train, evaluate and report; go on where an earlier call was stopped.

    Writes `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/` and, at the
    end, `report.md` with its pictures. A finished run is left as it is.

    Args:
      config: the run.
      workdir: its folder, made where it is missing.

    Returns:
      The last line of `metrics.jsonl`.

    Raises:
      ValueError: where the folder belongs to another config, the dataset is missing,
        or a field of the config does not fit. Nothing is overwritten.
    """
    check(config)
    folder = claim(workdir, config, write=False)
    here = {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    is_writer = here["process_index"] == 0
    if report.exists(folder):
        last = metrics.read(folder)[-1]
        if is_writer:
            print(f"{folder} holds this run, finished after {last['step']} steps.")
        return last

    # Devices: each holds the whole state and a part of every batch.
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    to_devices = functools.partial(jax.make_array_from_process_local_data, split)

    # Data.
    dataset = data.load(config.dataset, config.data_dir)
    batches = data.train_batches(
        dataset.train,
        config.batch_size,
        seed=config.seed,
        augment=config.augment,
        **here,
    )

    # Steps.
    training = prepare(config, dataset, replicated)
    train_step = make_train_step(training, dataset)
    eval_step = make_eval_step(training, dataset)
    learning_rate = build.schedule(config.optimizer, config.num_steps)

    # From here on the folder is this run's: everything above was in order.
    claim(workdir, config, write=is_writer)
    record, history = {}, []
    with _open_checkpoints(
        folder, keep=config.keep_checkpoints, clean_up=True
    ) as checkpoints:
        # State: from the last checkpoint, or new.
        if checkpoints.latest is None:
            start, state = 0, training.init()
        else:
            start = checkpoints.latest.step
            state = checkpoints.load_checkpointables(
                start, {"state": training.abstract, "data": batches}
            )["state"]

        # Loop.
        writer = metrics.Writer(folder, start, enabled=is_writer)
        progress = tqdm(total=config.num_steps, initial=start, disable=not is_writer)
        with writer, progress:
            logged, logged_at = start, time.perf_counter()
            for step in range(start + 1, config.num_steps + 1):
                batch = jax.tree.map(to_devices, next(batches))
                state, step_metrics = train_step(state, batch)
                history.append(step_metrics)
                progress.update()
                is_last = step == config.num_steps
                if step % config.log_every and not is_last:
                    continue

                # The mean over the steps since the last line; here the host waits.
                record = {"step": step, **_mean(history)}
                record["train/learning_rate"] = float(
                    np.asarray(learning_rate(step - 1))
                )
                seconds = time.perf_counter() - logged_at
                speed = config.batch_size * (step - logged) / seconds
                if step % config.eval_every == 0 or is_last:
                    test = data.eval_batches(
                        dataset.test, config.eval_batch_size, **here
                    )
                    arrays = (jax.tree.map(to_devices, batch) for batch in test)
                    record |= evaluate(eval_step, state, arrays)
                    record |= report.densities(training.masks(state))
                writer.write(record, clock={"clock/examples_per_second": speed})
                progress.set_postfix(report.headline(record))
                if step % config.checkpoint_every == 0 or is_last:
                    checkpoints.save_checkpointables_async(
                        step, {"state": state, "data": batches}, force=True
                    )
                history, logged, logged_at = [], step, time.perf_counter()

    # Report: the last thing that is written, it makes the run a finished one.
    masks = jax.device_get([training.masks(s) for s in (training.init(), state)])
    if is_writer:
        report.write(folder, config, dataset, *masks)
        print(f"The report of the run is {folder / report.FILE_NAME}")
    return record or metrics.read(folder)[-1]


def load(config: base.Config, workdir: str | os.PathLike) -> tuple[nnx.Module, Any]:
    """Load what a run has trained.

    Args:
      config: the run's config.
      workdir: the run's folder.

    Returns:
      The model and its masks (a tree like its parameters), from the last checkpoint.

    Raises:
      ValueError: where the folder belongs to another config or has no checkpoint.
    """
    folder = claim(workdir, config, write=False)
    training = prepare(
        config,
        data.load(config.dataset, config.data_dir),
        jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    )
    if not (folder / _CHECKPOINTS).exists():
        raise ValueError(f"{folder} has no checkpoints: train first.")
    with _open_checkpoints(folder) as checkpoints:
        state = checkpoints.load_checkpointables(None, {"state": training.abstract})[
            "state"
        ]
    return nnx.merge(training.graphdef, state)["model"], training.masks(state)


def make_train_step(
    training: Training, dataset: data.Dataset
) -> Callable[[State, data.Batch], tuple[State, dict[str, jax.Array]]]:
    """Compile (state, batch) -> (next state, metrics); it takes the state's buffers."""

    def train_step(state, batch):
        modules = nnx.merge(training.graphdef, state)
        images, labels = dataset.normalize(batch["image"]), batch["label"]

        def loss_fn(model):
            model.train()
            logits = model(images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), logits

        model, optimizer = modules["model"], modules["optimizer"]
        (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, grads)
        accuracy = (logits.argmax(axis=-1) == labels).mean()
        state = nnx.as_pure(nnx.state(modules))
        return state, {"loss": loss, "accuracy": accuracy}

    # The state leaves as it came, so that the next step needs no other program.
    shardings = jax.tree.map(lambda x: x.sharding, training.abstract)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def make_eval_step(
    training: Training, dataset: data.Dataset
) -> Callable[[State, data.Batch], dict[str, jax.Array]]:
    """Compile (state, batch) -> sums over the batch, by the weights of its examples."""

    @jax.jit
    def eval_step(state, batch):
        model = nnx.merge(training.graphdef, state)["model"]
        model.eval()
        labels, weights = batch["label"], batch["weight"]
        logits = model(dataset.normalize(batch["image"]))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return {
            "loss": (losses * weights).sum(),
            "accuracy": ((logits.argmax(axis=-1) == labels) * weights).sum(),
            "count": weights.sum(),
        }

    return eval_step


def evaluate(
    eval_step: Callable[[State, data.Batch], dict[str, jax.Array]],
    state: State,
    batches: Iterable[data.Batch],
) -> metrics.Record:
    """Return means over all examples, each counted once."""
    sums = None
    for batch in batches:
        part = eval_step(state, batch)
        sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
    sums = jax.device_get(sums)
    count = sums.pop("count")
    return {f"test/{name}": float(total / count) for name, total in sums.items()}


def _mean(history: list[dict[str, jax.Array]]) -> metrics.Record:
    values = jax.device_get(history)
    return {
        f"train/{name}": float(np.mean([value[name] for value in values]))
        for name in values[0]
    }


def _open_checkpoints(
    folder: pathlib.Path, *, keep: int | None = None, clean_up: bool = False
) -> ocp.training.Checkpointer:
    latest = ocp.training.preservation_policies.LatestN(keep)
    return ocp.training.Checkpointer(
        str(folder / _CHECKPOINTS),
        preservation_policy=latest,  # pyright: ignore[reportArgumentType]
        cleanup_tmp_directories=clean_up,
    )


def check(config: base.Config) -> None:
    """Raise ValueError where fields of a config do not fit one another."""
    for name in ("num_steps", "log_every", "keep_checkpoints"):
        if getattr(config, name) < 1:
            raise ValueError(
                f"config.{name} must be at least 1, got {getattr(config, name)}."
            )
    for name in ("eval_every", "checkpoint_every"):
        _check_multiple(config, name, "config.log_every", config.log_every)
    for name in ("batch_size", "eval_batch_size"):
        _check_multiple(config, name, "the number of devices", jax.device_count())
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
