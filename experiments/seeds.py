"""One config under many seeds: trainings side by side, compiled once.

A seed determines the weights, the masks and the order of the data. Trainings of two
configs under the same seed share all three, and differ by the configs alone.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import stats

from configs import base
from experiments import data
from experiments.state import prepare
from experiments.train import make_eval_step, make_train_step


class Round(NamedTuple):
    """What a round of steps did to every training.

    Attributes:
      step: how many steps are done.
      losses: of the training batches, [steps of the round, seeds].
      accuracies: on the test images after the round, [seeds].
      masks: after the round, a tree like the parameters of bool [seeds, ...]; None
        where a leaf is dense.
      seconds: that the steps took, with their compilation in the first round.
    """

    step: int
    losses: np.ndarray
    accuracies: np.ndarray
    masks: Any
    seconds: float


# Rounds of the trainings by method.
History = Mapping[str, Sequence[Round]]


class Trainings:
    """The trainings of one config under several seeds, all at the same step.

    Args:
      config: what they share; its `seed` is left aside.
      dataset: what they are trained on.
      num_seeds: how many; the seeds are 0, 1, ...

    Attributes:
      state: as in `experiments.state`, each array with a leading axis of seeds.
      abstract: shapes, dtypes and shardings of `state`.
      first_masks: as `Round.masks`, before the first step.
    """

    def __init__(self, config: base.Config, dataset: data.Dataset, num_seeds: int):
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

        def init(seed):
            of_seed = dataclasses.replace(config, seed=seed)
            return prepare(of_seed, dataset, device).init()

        self._training = prepare(config, dataset, device)
        train_step = jax.vmap(make_train_step(self._training, dataset))
        eval_step = jax.vmap(make_eval_step(self._training, dataset), (0, None))

        def advance(state, batches):
            return jax.lax.scan(train_step, state, batches)

        self._advance = jax.jit(advance, donate_argnums=0)
        self._evaluate = jax.jit(eval_step)
        test = dataset.eval_batches(config.eval_batch_size)
        self._test_batches = list(test)
        self._step = 0
        # A map compiles in half the time of a vmap, and runs but once.
        self.state = jax.jit(lambda s: jax.lax.map(init, s))(jnp.arange(num_seeds))
        self.abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            self.state,
        )
        self.first_masks = self._masks()

    def advance(self, batches: data.Batch) -> Round:
        """Take one step for each batch of a round, as `rounds` yields them."""
        started = time.perf_counter()
        self.state, metrics = self._advance(self.state, batches)
        jax.block_until_ready(self.state)
        seconds = time.perf_counter() - started
        losses = np.asarray(metrics["loss"])
        self._step += len(losses)
        accuracies = self.accuracies(self.state)
        return Round(self._step, losses, accuracies, self._masks(), seconds)

    def accuracies(self, state: Any) -> np.ndarray:
        """Return the accuracy on the test images in a state, [seeds]."""
        parts = [self._evaluate(state, batch) for batch in self._test_batches]
        correct, count = (
            np.sum([np.asarray(part[name], float) for part in parts], axis=0)
            for name in ("accuracy", "count")
        )
        return correct / count

    def model(self, index: int) -> nnx.Module:
        """Return the network of one seed as it is, in evaluation mode."""
        state = jax.tree.map(lambda x: x[index], self.state)
        model = nnx.merge(self._training.graphdef, state)["model"]
        model.eval()
        return model

    def _masks(self) -> Any:
        return jax.device_get(self._training.masks(self.state))


def rounds(
    config: base.Config, dataset: data.Dataset, num_seeds: int, steps: int
) -> Iterator[data.Batch]:
    """Yield the batches of round after round, each array [steps, seeds, batch, ...].

    Args:
      config: its `batch_size` and `num_steps` are read.
      dataset: where the examples come from.
      num_seeds: as in `Trainings`.
      steps: how many a round has; the last one has what is left.
    """
    orders = [
        dataset.train_batches(config.batch_size, seed=seed) for seed in range(num_seeds)
    ]
    for start in range(0, config.num_steps, steps):
        length = min(steps, config.num_steps - start)
        yield _stack([_stack([next(order) for order in orders]) for _ in range(length)])


def _stack(batches: list[data.Batch]) -> data.Batch:
    return jax.tree.map(lambda *arrays: np.stack(arrays), *batches)


def mean_and_interval(
    values: Sequence[float] | np.ndarray, confidence: float = 0.95
) -> tuple[float, float]:
    """Return the mean of independent values and the half-width of its t-interval.

    Args:
      values: at least two.
      confidence: that the interval around the mean covers the true one.
    """
    values = np.asarray(values, float)
    quantile = stats.t.ppf((1 + confidence) / 2, len(values) - 1)
    return float(values.mean()), float(quantile * stats.sem(values))
