"""Runs of a comparison: each is trained once, and kept when it is done."""

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from configs import base
from experiments.files import replaced
from experiments.workdir import claim

# What one seed of one setting came to.
Run = dict[str, Any]

T = TypeVar("T")
# From a run that is asked for, and what counts its steps, to what it came to and the
# arrays to keep with it.
Train = Callable[[T, Callable[[int], Any]], tuple[Run, Mapping[str, Any]]]


def train_missing(
    workdir: str | os.PathLike,
    config: base.Config,
    runs: Mapping[str, T],
    train: Train[T],
) -> None:
    """Train the runs that the folder does not have yet, and write each at once.

    Args:
      workdir: belongs to this config; several processes may write different runs.
      config: the recipe that the runs share; each has its `num_steps`.
      runs: what is asked for, by the name of a run's files.
      train: trains one.

    Raises:
      ValueError: where the folder belongs to another config.
    """
    folder = claim(workdir, config)
    missing = {n: run for n, run in runs.items() if not (folder / f"{n}.json").exists()}
    total = config.num_steps * len(missing)
    with tqdm(total=total, unit="step", smoothing=0.05) as progress:
        for name, asked in missing.items():
            progress.set_description(name)
            run, arrays = train(asked, progress.update)
            if arrays:
                with replaced(folder / f"{name}.npz", "wb") as file:
                    np.savez(file, **arrays)
            with replaced(folder / f"{name}.json") as file:
                file.write(json.dumps(run, indent=1) + "\n")


def read(workdir: str | os.PathLike, names: Iterable[str]) -> list[Run]:
    """Return what trained runs came to."""
    paths = [pathlib.Path(workdir) / f"{name}.json" for name in names]
    return [json.loads(path.read_text()) for path in paths]


def part(runs: Sequence[T], shard: str) -> Sequence[T]:
    """Return the part of the runs that a shard "I/N" has, every N-th."""
    index, count = map(int, shard.split("/"))
    return runs[index::count]
