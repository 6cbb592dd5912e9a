"""The runs of a ToST comparison: sources of masks, each with and without the tricks."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import base
from experiments import build, data, given_masks, kept_runs
from experiments.kept_runs import Run
from experiments.state import State
from experiments.steps import (
    cross_entropy,
    evaluate,
    make_eval_step,
    make_train_step,
)
from experiments.tost_masks import Cell, find_masks
from sparsejax import recipes

TRICKS = ("vanilla", "neurons", "skips", "smoothing", "rescaling", "all")


class Asked(NamedTuple):
    """A run."""

    cell: Cell
    trick: str

    @property
    def name(self) -> str:
        """Of its file."""
        cell = self.cell
        return f"{cell.source}-{cell.sparsity}-{self.trick}-seed{cell.seed}"


def cells(
    sources: Sequence[str], sparsities: Sequence[float], num_seeds: int
) -> list[Cell]:
    """List the masks: every source at every sparsity, and the dense network."""
    every = range(num_seeds)
    sparse = [Cell(x, s, seed) for seed in every for s in sparsities for x in sources]
    return [*sparse, *(Cell("dense", 0.0, seed) for seed in every)]


def runs(of: Sequence[Cell], tricks: Sequence[str]) -> list[Asked]:
    """List the runs with some masks; the dense network has no tricks."""
    return [
        Asked(cell, trick)
        for cell in of
        for trick in (tricks if cell.sparsity else ["vanilla"])
    ]


def train_missing(
    workdir: str | os.PathLike,
    config: base.ToST,
    dataset: data.Dataset,
    asked: Sequence[Asked],
) -> None:
    """Train the runs that the folder does not have yet, and write each at once.

    Args:
      workdir: as in `kept_runs.train_missing`.
      config: the recipe; its `sparse` and `seed` are those of the runs.
      dataset: what to train and test on, in memory.
      asked: the runs; those of one mask after one another, so that it is found once.

    Raises:
      ValueError: where the folder belongs to another config.
    """
    trainer = _Trainer(config, dataset)
    train = lambda run, on_steps: (trainer.train(run, on_steps), {})
    kept_runs.train_missing(workdir, config, {run.name: run for run in asked}, train)


def read(workdir: str | os.PathLike, asked: Sequence[Asked]) -> list[Run]:
    """Return what trained runs came to."""
    return kept_runs.read(workdir, [run.name for run in asked])


def recipe(config: base.ToST, trick: str) -> recipes.ToST:
    """Return the recipe with one trick, all, or none."""
    has = lambda part: trick in (part, "all")
    ghost_steps = round(config.ghost_fraction * config.num_steps)
    neurons: Any = config.neurons
    return recipes.ToST(
        ghost_steps=ghost_steps if has("neurons") or has("skips") else 0,
        neurons=neurons if has("neurons") else None,
        skips=has("skips"),
        label_smoothing=config.label_smoothing if has("smoothing") else 0.0,
        iterations=config.rescale_iterations if has("rescaling") else 0,
    )


class _Program(NamedTuple):
    """The compiled steps of one network under one loss."""

    train_step: Callable[[State, data.Batch], tuple[State, dict[str, jax.Array]]]
    eval_step: Callable[[State, data.Batch], dict[str, jax.Array]]


class _Trainer:
    """Trains runs, each network and loss compiled once: masks are in the states."""

    def __init__(self, config: base.ToST, dataset: data.Dataset):
        self._config, self._dataset = config, dataset
        self._device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        self._optimizer = given_masks.optimizer_maker(config)
        self._programs: dict[Any, _Program] = {}
        self._found = functools.lru_cache(maxsize=1)(self._find)

        def loss(model: Any, batch: data.Batch) -> jax.Array:
            logits = model(dataset.normalize(batch["image"])).astype(jnp.float32)
            return cross_entropy(logits, jnp.asarray(batch["label"])).mean()

        self._loss = loss

    def train(self, asked: Asked, on_steps: Callable[[int], Any]) -> Run:
        """Train one run from its seed."""
        config, dataset, seed = self._config, self._dataset, asked.cell.seed
        how = recipe(config, asked.trick)
        model, masks = self._found(asked.cell)
        started = time.perf_counter()
        model = how.start(
            model,
            jax.ShapeDtypeStruct((1, *dataset.image_shape), np.float32),
            loss=self._loss,
            batches=dataset.train_batches(config.rescale_batch_size, seed=seed),
            masks=masks,
        )
        of_start = time.perf_counter() - started
        graphdef, state = self._split(model, self._optimizer(model, masks))
        ghosts = _size(model) - _size(recipes.remove_ghosts(model))
        batches = dataset.train_batches(config.batch_size, seed=seed)
        program = self._program(how, graphdef, state)
        losses, seconds = [], []
        for step in range(config.num_steps):
            if how.has_ghosts and step == how.ghost_steps:
                modules = nnx.merge(graphdef, state)
                both = how.before_step(step, modules["model"], modules["optimizer"])
                graphdef, state = self._split(*both)
                plain = dataclasses.replace(
                    how, ghost_steps=0, neurons=None, skips=False
                )
                program = self._program(plain, graphdef, state)
            elif step < how.ghost_steps:
                # As `before_step` does it, in the model's state.
                intensity = np.float32(how.intensity(step))
                state["model"]["ghost_intensity"] = intensity
            began = time.perf_counter()
            state, metrics = program.train_step(state, next(batches))
            losses.append(jax.block_until_ready(metrics["loss"]))
            seconds.append(time.perf_counter() - began)
            on_steps(1)
        record = evaluate(
            program.eval_step, state, dataset.eval_batches(config.eval_batch_size)
        )
        last = losses[-max(config.num_steps // 10, 1) :]
        return {
            "name": asked.name,
            **asked.cell._asdict(),
            "trick": asked.trick,
            "test_accuracy": record["test/accuracy"],
            "test_loss": record["test/loss"],
            "train_loss": float(np.mean(jax.device_get(last))),
            "active": sum(int(mask.sum()) for mask in jax.tree.leaves(masks)),
            "size": sum(mask.size for mask in jax.tree.leaves(masks)),
            "ghost_parameters": ghosts,
            "seconds": {
                "start": of_start,
                "ghosted": _median(seconds[: how.ghost_steps]),
                "plain": _median(seconds[how.ghost_steps :]),
            },
        }

    def _find(self, cell: Cell) -> tuple[nnx.Module, Any]:
        """Return the first network of a cell, dense, and its masks."""
        key = jax.random.key(cell.seed)
        model = build.model(self._config.model, self._dataset, key=key)
        model.train()
        return model, find_masks(cell, model, self._dataset)

    def _split(self, model: Any, optimizer: Any) -> tuple[nnx.GraphDef, State]:
        """Return the modules' definition and a copy of their arrays."""
        graphdef, state = nnx.split({"model": model, "optimizer": optimizer})
        # Steps take the buffers of their state, and the network is started from again.
        copy = lambda x: jax.device_put(jnp.array(x), self._device)
        return graphdef, jax.tree.map(copy, nnx.as_pure(state))

    def _program(
        self, how: recipes.ToST, graphdef: nnx.GraphDef, state: State
    ) -> _Program:
        """Return the steps of a network under a loss, the same for all masks."""
        key = (how.neurons, how.skips, how.label_smoothing)
        if key not in self._programs:
            smoothing = how.smoothing(self._dataset.num_classes)
            config = dataclasses.replace(self._config, label_smoothing=smoothing)
            training = given_masks.training(config, graphdef, state, self._device)
            self._programs[key] = _Program(
                make_train_step(training, self._dataset),
                make_eval_step(training, self._dataset),
            )
        return self._programs[key]


def _size(model: nnx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _median(seconds: Sequence[float]) -> float | None:
    return float(np.median(seconds)) if seconds else None
