"""Where the demo ends: trained networks made small, exported, and timed as served."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from configs import base
from experiments import build, data, fit
from sparsejax import analysis, compaction, serving
from sparsejax.masks.layout import named_leaves

FILES = {"dense": "dense.safetensors", "compacted": "compacted.safetensors"}
BATCHES = (1, 256, 4096)
_SCRIPT = pathlib.Path(__file__).with_name("serve.py")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the last part of a demo does to the first dense network."""

    # Of the channels of every hidden layer.
    channel_sparsity: float = 0.75
    # That the compacted network is trained on.
    num_steps: int = 200
    # Of timing, for each number of images.
    seconds: float = 0.7


class Network(NamedTuple):
    """A network on its way: what it is, what it costs, and what it gets right."""

    name: str
    neurons: str
    parameters: int
    flops: int
    accuracy: float


class Served(NamedTuple):
    """An exported network in a process of its own; seconds of calls by batch size."""

    num_bytes: int
    accuracy: float
    seconds: dict[int, np.ndarray]


class Compacted(NamedTuple):
    """What came of it.

    Attributes:
      networks: in order; each small one follows what it was made of.
      error: largest difference by compaction, relative to the largest output.
      served: the dense network and the last one, by name of `FILES`.
    """

    networks: list[Network]
    error: float
    served: dict[str, Served]


def run(
    plan: Plan,
    config: base.Config,
    dataset: data.Dataset,
    sparse: nnx.Module,
    dense: nnx.Module,
    folder: pathlib.Path,
) -> Compacted:
    """Compact a sparse and a dense network, train the latter on, export and serve it.

    Args:
      plan: what to do.
      config: how the networks were trained, and how the compacted one is.
      dataset: what on.
      sparse: by RigL, with a mask of single weights.
      dense: loses whole neurons.
      folder: where the files go.
    """
    x = jax.ShapeDtypeStruct((1, *dataset.image_shape), np.float32)
    line = lambda name, model: describe(name, model, dataset, x)
    small_sparse, of_sparse = compaction.compact(sparse, x)
    groups = compaction.channel_groups(dense, x)
    masked = groups.zero(dense, weakest(groups, dense, plan.channel_sparsity))
    small, of_masked = compaction.compact(masked, x)
    networks = [
        line(f"RigL at {config.sparse.sparsity:.0%} sparsity", sparse),
        line("compacted", small_sparse),
        line("trained dense", dense),
        line(f"{plan.channel_sparsity:.0%} of neurons masked", masked),
        line("compacted", small),
    ]
    train_on(small, config, dataset, plan.num_steps)
    networks.append(line(f"trained on for {plan.num_steps} steps", small))
    for name, model in {"dense": dense, "compacted": small}.items():
        serving.export(model, folder / FILES[name], x, overwrite=True)
    error = max(done.max_error / done.scale for done in (of_sparse, of_masked))
    return Compacted(networks, error, serve(folder, dataset, plan.seconds))


def weakest(
    groups: compaction.Report, model: nnx.Module, share: float
) -> dict[str, list[int]]:
    """Choose the channels of smallest norm, a share of each group that is not pinned.

    A channel's norm is that of all weights that produce it.

    Returns:
      By name of a group its weakest channels, as `Report.zero` takes them.
    """
    arrays = named_leaves(nnx.state(model))
    chosen = {}
    for group in groups.groups:
        if not group.free:
            continue
        squares = np.zeros(group.size)
        for member in group.where("producer"):
            array = np.moveaxis(np.asarray(arrays[member.path]), member.axis, 0)
            own = member.channels >= 0
            of_index = np.square(array[own]).reshape(own.sum(), -1).sum(axis=1)
            np.add.at(squares, member.channels[own], of_index)
        weak = np.argsort(squares, kind="stable")[: round(share * group.size)]
        chosen[group.name] = sorted(weak.tolist())
    return chosen


def train_on(
    model: nnx.Module, config: base.Config, dataset: data.Dataset, num_steps: int
) -> None:
    """Train a network in place, all its weights, as the config trains a dense one."""
    dense = dataclasses.replace(config.sparse, method="dense")
    config = dataclasses.replace(config, sparse=dense, num_steps=num_steps)
    tx = build.optimizer(config, key=jax.random.key(config.seed))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    steps = {"num_steps": num_steps, "batch_size": config.batch_size}
    fit.fit(model, optimizer, dataset, seed=config.seed, **steps)


def describe(name: str, model: Any, dataset: data.Dataset, x: Any) -> Network:
    """Return the line of a network."""
    groups = compaction.channel_groups(model, x)
    sizes = [str(group.size) for group in groups.groups if group.free]
    return Network(
        name,
        ", ".join(sizes),
        groups.parameters[0],
        analysis.flops(model, x),
        fit.accuracy(model, dataset),
    )


def serve(
    folder: pathlib.Path, dataset: data.Dataset, seconds: float
) -> dict[str, Served]:
    """Load the exported files in a process that knows no Flax, and time them there."""
    with tempfile.TemporaryDirectory() as temporary:
        examples = pathlib.Path(temporary, "examples.npz")
        images = np.asarray(dataset.normalize(dataset.test.images))
        np.savez(examples, images=images, labels=dataset.test.labels)
        command = [
            *(sys.executable, _SCRIPT, f"--examples={examples}"),
            *(f"--batch={size}" for size in BATCHES),
            *(f"--seconds={seconds}", *(folder / name for name in FILES.values())),
        ]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured = json.loads(done.stdout)
    return {
        name: Served(
            (folder / file).stat().st_size,
            measured["accuracy"][file],
            {size: np.array(measured["seconds"][str(size)][file]) for size in BATCHES},
        )
        for name, file in FILES.items()
    }
