"""What compaction makes of trained networks: their sizes, their outputs, their time."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from configs import base
from experiments import data, structured_runs, timing
from experiments.structured_runs import Run
from sparsejax import analysis, compaction

BATCHES = (1, 64)
# Convolutions of XLA on a CPU take longer for other numbers of channels.
ROUND_TO = 4

# From images to logits.
Serve = Callable[[jax.Array], jax.Array]
# The same, from a network's leaves and images.
Program = Callable[[list[jax.Array], jax.Array], jax.Array]


def measure(
    workdir: str | os.PathLike,
    config: base.Config,
    dataset: data.Dataset,
    runs: Sequence[tuple[base.Sparse, int]],
    seconds: float,
) -> list[Run]:
    """Compact the networks of trained runs, and compare each with what it was.

    Args:
      workdir: where `structured_runs.train_missing` has put the runs.
      config: the recipe.
      dataset: whose test images the outputs are compared on.
      runs: settings and seeds.
      seconds: of timing the networks in turn, for each of `BATCHES`.

    Returns:
      Each run with "channels" (by group that can shrink, how many are left and were),
      "parameters" and "flops" of an image (before and after), "error" (largest
      difference of logits over the test images, relative to the largest logit),
      "times" and "ratios" (by batch size and network, "masked", "compacted" and, with
      channels in multiples of `ROUND_TO`, "rounded": medians and their intervals, as
      `timing.median_and_interval` has them, of seconds and of how many times faster
      than the masked network it is).

    Raises:
      CompactionError: where a network cannot be compacted.
    """
    load = functools.partial(structured_runs.load, workdir, config, dataset)
    trained = structured_runs.read(workdir, runs)
    program = _program(load(trained[0]))  # masked networks share it
    return [
        run | _measured(load(run), program, dataset, seconds)
        for run in tqdm(trained, desc="compact and time")
    ]


def _measured(
    model: nnx.Module, program: Program, dataset: data.Dataset, seconds: float
) -> dict[str, Any]:
    image = jax.ShapeDtypeStruct((1, *dataset.image_shape), np.float32)
    small, report = compaction.compact(model, image)
    even, _ = compaction.compact(model, image, round_to=ROUND_TO)
    serve = {
        "masked": functools.partial(program, _leaves(model)),
        "compacted": functools.partial(_program(small), _leaves(small)),
        "rounded": functools.partial(_program(even), _leaves(even)),
    }
    times = {size: _times(serve, dataset, size, seconds) for size in BATCHES}
    median = functools.partial(jax.tree.map, timing.median_and_interval)
    return {
        "channels": {
            group.name: [group.size - report.removed.get(group.name, 0), group.size]
            for group in report.groups
            if group.free
        },
        "parameters": report.parameters,
        "flops": [analysis.flops(network, image) for network in (model, small)],
        "error": _error(serve["masked"], serve["compacted"], dataset),
        "times": {size: median(t) for size, t in times.items()},
        "ratios": {
            size: median({name: t["masked"] / own for name, own in t.items()})
            for size, t in times.items()
        },
    }


def _program(model: nnx.Module) -> Program:
    """Return a function to call with a network's leaves and images, compiled."""
    graphdef, state = nnx.split(model)
    treedef = jax.tree.structure(state)
    call = lambda leaves, images: nnx.merge(graphdef, treedef.unflatten(leaves))(images)
    return jax.jit(call)


def _leaves(model: nnx.Module) -> list[jax.Array]:
    return jax.tree.leaves(nnx.state(model))


def _error(masked: Serve, compacted: Serve, dataset: data.Dataset) -> float:
    difference = largest = 0.0
    for batch in dataset.eval_batches(BATCHES[-1]):
        images = dataset.normalize(batch["image"])
        before, after = (np.asarray(serve(images)) for serve in (masked, compacted))
        difference = max(difference, float(np.abs(before - after).max()))
        largest = max(largest, float(np.abs(before).max()))
    return difference / largest


def _times(
    serve: Mapping[str, Serve], dataset: data.Dataset, size: int, seconds: float
) -> dict[str, np.ndarray]:
    batch = next(iter(dataset.eval_batches(size)))
    images = dataset.normalize(batch["image"])
    calls = {name: functools.partial(call, images) for name, call in serve.items()}
    return timing.in_turn(calls, seconds=seconds, max_rounds=5000)
