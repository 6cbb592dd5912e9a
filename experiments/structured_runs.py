"""The runs of a structured comparison: each is trained once and kept in two files."""

import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import base
from experiments import build, data, kept_runs
from experiments.kept_runs import Run
from experiments.state import State, prepare
from experiments.steps import evaluate, make_eval_step, make_train_step
from sparsejax import analysis
from sparsejax.masks.layout import named_leaves

METHODS = ("dense", "static", "rigl", "srigl", "chase")
GAMMAS = (0.0, 0.3)  # without ablation, and with the paper's
CHANNEL_SPARSITIES = (0.0, 0.3, 0.5)


def settings(
    sparse: base.Sparse, methods: Sequence[str], sparsities: Sequence[float]
) -> list[base.Sparse]:
    """List what is compared: a method, its sparsity, and what it alone is given.

    Every method is at every sparsity, but "dense" and, which is at the first, "chase".
    """
    found = []
    for method in methods:
        own = dataclasses.replace(sparse, method=method)
        at = {"dense": [0.0], "chase": sparsities[:1]}.get(method, sparsities)
        variants: list[dict[str, float]] = {
            "srigl": [{"gamma": gamma} for gamma in GAMMAS],
            "chase": [{"channel_sparsity": part} for part in CHANNEL_SPARSITIES],
        }.get(method, [{}])
        found += [
            dataclasses.replace(own, sparsity=sparsity, **variant)
            for sparsity in at
            for variant in variants
        ]
    return found


def name(sparse: base.Sparse, seed: int) -> str:
    """Return the name of a run's files."""
    own = {"srigl": [sparse.gamma], "chase": [sparse.channel_sparsity]}
    values = [sparse.sparsity, *own.get(sparse.method, [])]
    return "-".join([sparse.method, *map(str, values), f"seed{seed}"])


def train_missing(
    workdir: str | os.PathLike,
    config: base.Config,
    dataset: data.Dataset,
    runs: Sequence[tuple[base.Sparse, int]],
) -> None:
    """Train the runs that the folder does not have yet, and write each at once.

    Args:
      workdir: as in `kept_runs.train_missing`.
      config: the recipe; its `sparse` and `seed` are those of the runs.
      dataset: what to train and test on.
      runs: settings and seeds.

    Raises:
      ValueError: where the folder belongs to another config.
    """
    trainer = functools.cache(lambda method: _Trainer(config, dataset, method))

    def train(asked, on_steps):
        sparse, seed = asked
        run, state = trainer(sparse.method).train(sparse, seed, on_steps)
        return run, jax.device_get(named_leaves(state["model"]))

    kept_runs.train_missing(workdir, config, {name(*run): run for run in runs}, train)


def read(
    workdir: str | os.PathLike, runs: Sequence[tuple[base.Sparse, int]]
) -> list[Run]:
    """Return what trained runs came to."""
    return kept_runs.read(workdir, [name(*run) for run in runs])


def load(
    workdir: str | os.PathLike, config: base.Config, dataset: data.Dataset, run: Run
) -> nnx.Module:
    """Return the network of a run, zeros off its masks, in evaluation mode."""
    create = lambda: build.model(config.model, dataset, key=jax.random.key(0))
    graphdef, abstract = nnx.split(nnx.eval_shape(create))
    path = pathlib.Path(workdir) / f"{run['name']}.npz"
    with np.load(path, allow_pickle=False) as arrays:
        leaves = [jnp.asarray(arrays[path]) for path in named_leaves(abstract)]
    model = nnx.merge(graphdef, jax.tree.structure(abstract).unflatten(leaves))
    model.eval()
    return model


class _Trainer:
    """Trains the runs of one method with one compiled step.

    What tells the runs apart, sparsity, gamma and channel sparsity, is in the states.
    """

    def __init__(self, config: base.Config, dataset: data.Dataset, method: str):
        sparse = dataclasses.replace(config.sparse, method=method)
        self._config = dataclasses.replace(config, sparse=sparse)
        self._dataset = dataset
        self._device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        self._training = prepare(self._config, dataset, self._device)
        self._train_step = make_train_step(self._training, dataset)
        self._eval_step = make_eval_step(self._training, dataset)
        self._inits: dict[str, Callable[[int], State]] = {}

    def train(
        self, sparse: base.Sparse, seed: int, on_steps: Callable[[int], Any]
    ) -> tuple[Run, State]:
        """Train one run from its seed, and return it with its last state."""
        config, dataset = self._config, self._dataset
        batches = dataset.train_batches(config.batch_size, seed=seed)
        state, losses = self._first_state(sparse, seed), []
        started = time.perf_counter()
        for step in range(config.num_steps):
            state, metrics = self._train_step(state, next(batches))
            losses.append(metrics["loss"])
            if (step + 1) % config.log_every == 0:
                jax.block_until_ready(state)
                on_steps(config.log_every)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - started
        test = dataset.eval_batches(config.eval_batch_size)
        record = evaluate(self._eval_step, state, test)
        masks = self._kernel_masks(state)
        last = losses[-max(config.num_steps // 10, 1) :]
        run = {
            "name": name(sparse, seed),
            "sparse": dataclasses.asdict(sparse),
            "seed": seed,
            "test_accuracy": record["test/accuracy"],
            "train_loss": float(np.mean(jax.device_get(last))),
            "active": sum(int(mask.sum()) for mask in masks.values()),
            "size": sum(mask.size for mask in masks.values()),
            "neurons": {
                path: [int((counts > 0).sum()), counts.size]
                for path, counts in analysis.fan_in(masks).items()
            },
            "seconds": seconds,
        }
        return run, state

    def _first_state(self, sparse: base.Sparse, seed: int) -> State:
        setting = name(sparse, 0)
        if setting not in self._inits:

            def init(seed: jax.Array) -> State:
                config = dataclasses.replace(self._config, sparse=sparse, seed=seed)
                return prepare(config, self._dataset, self._device).init()

            self._inits[setting] = jax.jit(init, out_shardings=self._device)
        return self._inits[setting](seed)

    def _kernel_masks(self, state: State) -> dict[str, np.ndarray]:
        masks = self._training.masks(state)
        if masks is None:
            masks = jax.tree.map(lambda x: np.ones(x.shape, bool), state["model"])
        named = named_leaves(jax.device_get(masks))
        return {path: mask for path, mask in named.items() if mask.ndim > 1}
