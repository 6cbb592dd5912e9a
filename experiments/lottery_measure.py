"""How long tickets take, executed as the structure that they have."""

import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from configs import base
from experiments import build, data, kept_runs, lottery_runs, timing
from experiments.kept_runs import Run
from experiments.lottery_masks import TIMED
from experiments.lottery_runs import Ticket
from experiments.lottery_train import Asked, is_prunable
from sparsejax import analysis, compaction, serving
from sparsejax.masks.layout import named_leaves

BATCH = 64
# Convolutions of XLA on a CPU take longer for other numbers of channels.
ROUND_TO = 4

Pairs = Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]


def measure(
    workdir: str | os.PathLike,
    config: base.Lottery,
    dataset: data.Dataset,
    asked: Sequence[Asked],
    seconds: float,
) -> list[Run]:
    """Execute structured tickets, and compare each with the dense network.

    Refilled ones are compacted, those of blocks run from them. Then every layer of
    every network, the dense one included, takes the form that is best for it by
    `serving.measure_forms`. What is measured is kept, as runs are.

    Args:
      workdir: where `lottery_runs.train_missing` has put the runs.
      config: the recipe.
      dataset: whose test images the networks are called with.
      asked: the runs.
      seconds: of timing a ticket and the dense networks in turn.

    Returns:
      Each run. Those of `TIMED` have "forms" (by layer), "flops" of an image
      (the ticket's and the dense network's), "error" (largest difference of logits to
      the masked network, relative to the largest), "times" (of a batch, by network:
      "dense" by XLA's convolutions, "best dense" in the best dense forms, "ticket")
      and "ratios" (how many times faster than the first two the ticket is), both as
      `timing.median_and_interval` has them.

    Raises:
      CompactionError: where a ticket cannot be compacted, or its blocks be executed.
    """
    clock = functools.cache(lambda: _Clock(config, dataset, seconds))

    def of_run(run, on_steps):
        measured = clock().measure(lottery_runs.load(workdir, config, dataset, run))
        on_steps(config.num_steps)
        return measured, {}

    trained = lottery_runs.read(workdir, asked)
    structured = {run["name"]: run for run in trained if run["branch"] in TIMED}
    folder = pathlib.Path(workdir) / "measured"
    kept_runs.train_missing(folder, config, structured, of_run)
    measured = dict(zip(structured, kept_runs.read(folder, structured), strict=True))
    return [run | measured.get(run["name"], {}) for run in trained]


class _Clock:
    """Times tickets against one dense network, which is compiled once."""

    def __init__(self, config: base.Lottery, dataset: data.Dataset, seconds: float):
        batch = next(iter(dataset.eval_batches(BATCH)))
        self._images = dataset.normalize(batch["image"])
        self._seconds = seconds
        dense = build.model(config.model, dataset, key=jax.random.key(0))
        dense.eval()
        best, swapped = _in_best_forms(dense, {}, self._images, {})
        self._known = swapped.measured
        self._flops = analysis.flops(dense, self._images) // BATCH
        self._dense = {
            "dense": _call(dense, self._images),
            "best dense": _call(best, self._images),
        }

    def measure(self, ticket: Ticket) -> dict[str, Any]:
        """Execute a ticket; see `measure` above for the fields."""
        model, images, known = ticket.model, self._images, self._known
        if not ticket.blocks:
            model, _ = compaction.compact(model, images[:1], round_to=ROUND_TO)
            known = {}
        fast, swapped = _in_best_forms(model, ticket.blocks, images, known)
        calls = {**self._dense, "ticket": _call(fast, images)}
        times = timing.in_turn(calls, seconds=self._seconds)
        masked, own = np.asarray(ticket.model(images)), np.asarray(fast(images))
        median = functools.partial(jax.tree.map, timing.median_and_interval)
        return {
            "forms": swapped.forms,
            "flops": [analysis.flops(fast, images) // BATCH, self._flops],
            "error": float(np.abs(masked - own).max() / np.abs(masked).max()),
            "times": median(times),
            "ratios": median({n: times[n] / times["ticket"] for n in self._dense}),
        }


def _in_best_forms(
    model: nnx.Module,
    blocks: Pairs,
    images: jax.Array,
    known: Mapping[str, serving.Measured],
) -> tuple[nnx.Module, serving.Swapped]:
    """Return a network whose layers have their best forms.

    A layer without blocks is one block of all its weights, for which the forms are two:
    XLA's convolution, and a product with the unfolded images. Those that are known need
    not be measured.
    """
    whole = {
        path: serving.Blocks.full(kernel.shape).blocks
        for path, kernel in named_leaves(nnx.state(model, nnx.Param)).items()
        if is_prunable(path, kernel) and kernel.size and path not in blocks
    }
    measured = {path: known[path] for path in whole if path in known}
    return serving.with_blocks(model, {**whole, **blocks}, images, measured=measured)


def _call(model: nnx.Module, images: jax.Array) -> Callable[[], jax.Array]:
    """Return a compiled call; weights are arguments of it."""
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda state, images: nnx.merge(graphdef, state)(images))
    return functools.partial(call, state, images)
