"""One run of a lottery: a round of pruning, or what is trained under its masks."""

import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import base
from experiments import build, data, given_masks, lottery_masks
from experiments.kept_runs import Run
from experiments.state import State, Training, mask
from experiments.steps import evaluate, make_eval_step, make_train_step
from sparsejax import compaction, lottery
from sparsejax.masks.layout import named_leaves

# The rounds themselves, and the dense network from the snapshot that they go back to.
IMP, REWOUND = "imp", "dense-rewound"

OnSteps = Callable[[int], Any]


class Asked(NamedTuple):
    """A run: round 0 of "imp" is the dense network."""

    seed: int
    round: int
    branch: str

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.branch}-round{self.round}-seed{self.seed}"


def is_prunable(path: str, leaf: Any) -> bool:
    """Return whether the paper prunes a leaf: convolutions but a ResNet's first."""
    return leaf.ndim == 4 and "stem" not in path


class Trainer:
    """Trains runs with one compiled step: masks are in the states."""

    def __init__(
        self, config: base.Lottery, dataset: data.Dataset, workdir: pathlib.Path
    ):
        self._config, self._dataset, self._workdir = config, dataset, workdir
        self._optimizer = given_masks.optimizer_maker(config)
        self._device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        self._draw = jax.jit(lambda key: nnx.as_pure(nnx.state(self._model(key))))
        self._like = jax.eval_shape(self._draw, jax.random.key(0))
        self._network = nnx.split(nnx.eval_shape(self._model, jax.random.key(0)))[0]
        self._begin = jax.jit(
            lambda *start: nnx.as_pure(nnx.state(self._modules(*start))),
            out_shardings=self._device,
        )
        training = self._training()
        self._train_step = make_train_step(training, dataset)
        self._eval_step = make_eval_step(training, dataset)

    def train(self, asked: Asked, on_steps: OnSteps) -> tuple[Run, dict[str, Any]]:
        """Train one run, and return it with the arrays of a structured ticket."""
        began = time.perf_counter()
        if asked.branch == IMP:
            done = self._round(asked, on_steps)
            state, found = done.state, lottery_masks.Found(done.masks, (), {})
        else:
            state, found = self._branch(asked, on_steps)
        seconds = time.perf_counter() - began
        test = self._dataset.eval_batches(self._config.eval_batch_size)
        running = self._begin(state, self._whole(found.masks))
        record = evaluate(self._eval_step, running, test)
        masks = jax.device_get(named_leaves(found.masks))
        # Refilling masks norms and the head, too, which are not counted.
        layers = [p for p, leaf in masks.items() if is_prunable(p, leaf)]
        size = sum(masks[path].size for path in layers)
        within = sum(masks[path].size for path in found.structured)
        run = {
            "name": asked.name,
            **asked._asdict(),
            "test_accuracy": record["test/accuracy"],
            "test_loss": record["test/loss"],
            "active": sum(int(masks[path].sum()) for path in layers),
            "size": size,
            "structured": found.structured,
            "structured_fraction": within / size,
            "seconds": seconds,
        }
        if asked.branch not in lottery_masks.TIMED:
            return run, {}
        kept = {
            "model": named_leaves(jax.device_get(running["model"])),
            "masks": masks,
            "assignments": found.assignments,
        }
        arrays = {
            f"{kind}/{p}": x for kind, own in kept.items() for p, x in own.items()
        }
        return run, arrays

    def _round(self, asked: Asked, on_steps: OnSteps) -> lottery.Round:
        """Train the next round of a seed, or read it if the folder has it."""
        config, folder = self._config, self._rounds(asked.seed)
        last = lottery.restore_round(folder, self._like, params_of=self._params)
        if last is not None and last.index >= asked.round:
            return self._restored(asked)

        def train(state, masks, index):
            at = round(config.rewind_fraction * config.num_steps) if not index else None
            return self._fit(state, masks, asked.seed, on_steps, snapshot_at=at)

        for done in lottery.iterative_magnitude_pruning(
            train,
            self._draw(jax.random.key(asked.seed)),
            rounds=asked.round,
            rate=config.rate,
            where=is_prunable,
            params_of=self._params,
            resume=last,
        ):
            lottery.save_round(folder, done)
        return self._restored(asked)

    def _branch(
        self, asked: Asked, on_steps: OnSteps
    ) -> tuple[State, lottery_masks.Found]:
        """Train under the masks that a round is turned into."""
        needed = asked._replace(branch=IMP)
        if not (self._workdir / f"{needed.name}.json").exists():
            raise ValueError(
                f"{asked.name} needs {needed.name}, which is not in {self._workdir}: "
                "another shard trains it. Give this command again when it has."
            )
        pruned, seed = self._restored(needed), asked.seed
        if asked.branch == REWOUND:
            found = lottery_masks.Found(pruned.masks, (), {})
        else:
            params = self._params(pruned.state)
            found = self._finder.find(asked.branch, pruned, params, seed)
        start = pruned.snapshot
        if asked.branch.endswith(lottery_masks.REINIT):
            start = self._draw(jax.random.fold_in(jax.random.key(seed), 1))
        return self._fit(start, found.masks, seed, on_steps)[0], found

    def _fit(
        self,
        start: State,
        masks: Any,
        seed: int,
        on_steps: OnSteps,
        *,
        snapshot_at: int | None = None,
    ) -> tuple[State, State | None]:
        """Train from a model's arrays, and return its last and, if asked, early ones.

        Momentum, the learning rate and the images start afresh, as in the code of the
        paper.
        """
        config, snapshot = self._config, None
        batches = self._dataset.train_batches(config.batch_size, seed=seed)
        running = self._begin(start, self._whole(masks))
        for step in range(config.num_steps):
            if step == snapshot_at:
                snapshot = jax.tree.map(jnp.copy, running["model"])
            running, metrics = self._train_step(running, next(batches))
            if (step + 1) % config.log_every == 0:
                jax.block_until_ready(metrics)
                on_steps(config.log_every)
        return running["model"], snapshot

    def _restored(self, asked: Asked) -> lottery.Round:
        found = lottery.restore_round(
            self._rounds(asked.seed), self._like, asked.round, params_of=self._params
        )
        assert found is not None
        return found

    def _rounds(self, seed: int) -> pathlib.Path:
        return self._workdir / f"rounds-seed{seed}"

    def _model(self, key: jax.Array) -> nnx.Module:
        model = build.model(self._config.model, self._dataset, key=key)
        build.compute_in(model, self._config.dtype)
        return model

    def _params(self, state: State) -> Any:
        """Return the parameters among a model's arrays."""
        model = nnx.merge(self._network, state)
        return nnx.as_pure(nnx.state(model, nnx.Param))

    def _modules(self, state: State, masks: Any) -> dict[str, Any]:
        """Return a model of these arrays under masks, and a new optimizer."""
        model = nnx.merge(self._network, state)
        optimizer = self._optimizer(model, masks)
        mask(model, optimizer)
        return {"model": model, "optimizer": optimizer}

    def _whole(self, masks: Any) -> Any:
        """Give dense leaves a mask, too, so that all masks are trees of one form."""
        fill = lambda own, param: np.ones(param.shape, bool) if own is None else own
        is_none = lambda x: x is None
        return jax.tree.map(fill, masks, self._params(self._like), is_leaf=is_none)

    def _training(self) -> Training:
        masks = self._whole(jax.tree.map(lambda _: None, self._params(self._like)))
        modules = nnx.eval_shape(self._modules, self._like, masks)
        graphdef, abstract = nnx.split(modules)
        return given_masks.training(
            self._config, graphdef, nnx.as_pure(abstract), self._device
        )

    @functools.cached_property
    def _finder(self) -> lottery_masks.Finder:
        model = nnx.eval_shape(self._model, jax.random.key(0))
        model.eval()
        image = jax.ShapeDtypeStruct((1, *self._dataset.image_shape), np.float32)
        channels = compaction.channel_groups(model, image)
        return lottery_masks.Finder(self._config, channels)
