"""The runs of a lottery, and the tickets that they leave."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import base
from experiments import build, data, kept_runs, lottery_masks
from experiments.kept_runs import Run
from experiments.lottery_train import IMP, REWOUND, Asked, Trainer
from sparsejax.masks.layout import named_leaves


def runs(branches: Sequence[str], rounds: int, num_seeds: int) -> list[Asked]:
    """List all runs, in an order in which each finds what it needs.

    Raises:
      ValueError: there is no such branch.
    """
    lottery_masks.check_branches(branches)
    return [
        asked
        for seed in range(num_seeds)
        for asked in (
            *(Asked(seed, index, IMP) for index in range(rounds + 1)),
            Asked(seed, 0, REWOUND),
            *(
                Asked(seed, index, branch)
                for index in range(1, rounds + 1)
                for branch in branches
            ),
        )
    ]


def part(asked: Sequence[Asked], shard: str) -> list[Asked]:
    """Return the runs of a shard "I/N", about as many as any other has.

    Every N-th seed's rounds are its own. What is trained under the masks of a round
    goes to one shard, whichever has the least; a shard begins with its own rounds'.
    """
    index, count = map(int, shard.split("/"))
    parts: list[list[Asked]] = [[] for _ in range(count)]
    cells: dict[tuple[int, int], list[Asked]] = {}
    for run in asked:
        if run.branch == IMP:
            parts[run.seed % count].append(run)
        else:
            cells.setdefault((run.seed, run.round), []).append(run)
    for cell in cells.values():
        min(parts, key=len).extend(cell)
    is_later = lambda run: (run.branch != IMP) + (run.seed % count != index)
    return sorted(parts[index], key=is_later)


def train_missing(
    workdir: str | os.PathLike,
    config: base.Lottery,
    dataset: data.Dataset,
    asked: Sequence[Asked],
) -> None:
    """Train the runs that the folder does not have yet, and write each at once.

    Args:
      workdir: as in `kept_runs.train_missing`; rounds are checkpoints in it, too.
      config: the recipe; its `seed` is that of the runs.
      dataset: what to train and test on.
      asked: the runs.

    Raises:
      ValueError: where the folder belongs to another config, or has not the round
        that a run needs.
    """
    trainer = Trainer(config, dataset, pathlib.Path(workdir))
    kept_runs.train_missing(
        workdir, config, {run.name: run for run in asked}, trainer.train
    )


def read(workdir: str | os.PathLike, asked: Sequence[Asked]) -> list[Run]:
    """Return what trained runs came to."""
    return kept_runs.read(workdir, [run.name for run in asked])


class Ticket(NamedTuple):
    """The network of a run, zeros off its masks, in evaluation mode; and its blocks.

    Blocks are pairs of rows and columns by the path of a kernel.
    """

    model: nnx.Module
    blocks: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]


def load(
    workdir: str | os.PathLike, config: base.Lottery, dataset: data.Dataset, run: Run
) -> Ticket:
    """Return the ticket that a run of a structured branch has trained."""
    create = lambda: build.model(config.model, dataset, key=jax.random.key(0))
    graphdef, abstract = nnx.split(nnx.eval_shape(create))
    path = pathlib.Path(workdir) / f"{run['name']}.npz"
    with np.load(path, allow_pickle=False) as arrays:
        leaves = [jnp.asarray(arrays[f"model/{p}"]) for p in named_leaves(abstract)]
        blocks = {
            p: _blocks(arrays[f"masks/{p}"], arrays[f"assignments/{p}"])
            for p in run["structured"]
            if f"assignments/{p}" in arrays
        }
    model = nnx.merge(graphdef, jax.tree.structure(abstract).unflatten(leaves))
    model.eval()
    return Ticket(model, blocks)


def _blocks(mask: np.ndarray, assignment: np.ndarray):
    """Return rows and columns of the blocks of a mask [..., out]."""
    matrix = mask.reshape(-1, mask.shape[-1]).T
    rows_of = [np.flatnonzero(assignment == g) for g in range(assignment.max() + 1)]
    return [(rows, np.flatnonzero(matrix[rows].any(axis=0))) for rows in rows_of]
