"""The demo: one config by every method, and what training ends in, a small network."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from configs import base, digits_rigl
from experiments import (
    compact_demo,
    compact_report,
    data,
    demo_report,
    metrics,
    report,
)
from experiments.seeds import History, Trainings, rounds
from experiments.workdir import claim

METHODS = ("dense", "static", "set", "rigl", "magnitude")


@dataclasses.dataclass
class Demo:
    """What is trained: one config by every method, each under the same seeds."""

    config: base.Config = dataclasses.field(default_factory=digits_rigl.get_config)
    num_seeds: int = 10
    compact: compact_demo.Plan = dataclasses.field(default_factory=compact_demo.Plan)

    def config_of(self, method: str) -> base.Config:
        sparse = dataclasses.replace(self.config.sparse, method=method)
        return dataclasses.replace(self.config, sparse=sparse)


def run(demo: Demo, workdir: str | os.PathLike) -> None:
    """Train, save, read back and report; a finished demo is left as it is.

    Args:
      demo: what to train.
      workdir: its folder, made where it is missing. An unfinished demo in it is begun
        again.

    Raises:
      ValueError: where the folder holds something else. Nothing is changed then.
    """
    folder = claim(workdir, demo, write=False)
    if report.exists(folder):
        print(
            f"{folder} holds a finished demo, and nothing was changed: read "
            f"{report.FILE_NAME} there. To run the demo again, remove the folder or "
            "choose another one with --workdir."
        )
        return
    dataset = data.load(demo.config.data)
    trainings = {
        method: Trainings(demo.config_of(method), dataset, demo.num_seeds)
        for method in tqdm(METHODS, desc="weights and masks", unit="method")
    }
    claim(workdir, demo)
    history = train(demo, dataset, trainings, folder)
    verified = save_and_verify(trainings["rigl"], folder / "checkpoint")
    first_masks = trainings["rigl"].first_masks
    compacted = compact_demo.run(
        demo.compact,
        demo.config,
        dataset,
        sparse=trainings["rigl"].model(0),
        dense=trainings["dense"].model(0),
        folder=folder,
    )
    demo_report.write(
        folder, demo.config, dataset, history, first_masks, verified, compacted
    )

    print(f"\n{demo_report.table(history)}\n\n{demo_report.gain(history)}\n{verified}")
    print("\n" + "\n\n".join(compact_report.sections(compacted)))
    print(f"\nEverything is in {folder}:")
    print(f"  {report.FILE_NAME:<14} this table, what it means, and pictures")
    print(f"  {metrics.FILE_NAME:<14} loss, accuracy and sparsity after every round")
    print(f"  {'checkpoint':<14} the RigL networks, with masks and optimizer slots")
    print(f"  {'*.safetensors':<14} the dense and the compacted network, to be served")


def train(
    demo: Demo,
    dataset: data.Dataset,
    trainings: Mapping[str, Trainings],
    folder: pathlib.Path,
) -> History:
    """Train round by round, each by all methods in turn: they meet the same machine."""
    history = {method: [] for method in trainings}
    # One mask update a round, so that rounds cost the same.
    steps = demo.config.sparse.update_every
    progress = tqdm(total=demo.config.num_steps, desc="training", unit="step")
    with metrics.Writer(folder) as writer, progress:
        for batches in rounds(demo.config, dataset, demo.num_seeds, steps):
            record = {}
            for method, training in trainings.items():
                done = training.advance(batches)
                history[method].append(done)
                record |= {
                    "step": done.step,
                    f"{method}/train/loss": float(done.losses.mean()),
                    f"{method}/test/accuracy": float(done.accuracies.mean()),
                    f"{method}/sparsity": report.densities(done.masks)["sparsity"],
                }
            writer.write(record)
            progress.update(steps)
    return history


def save_and_verify(training: Trainings, path: pathlib.Path) -> str:
    """Save the state of trainings, read it back, and say what came back."""
    ocp.save_checkpointables(str(path), {"state": training.state}, overwrite=True)
    loaded = ocp.load_checkpointables(str(path), {"state": training.abstract})["state"]
    jax.tree.map(np.testing.assert_array_equal, loaded, training.state)
    return (
        "The checkpoint of RigL was read back: every array as it was, and "
        f"{training.accuracies(loaded).mean():.2%} test accuracy."
    )
