"""The report of the demo: `report.md`, a table of methods, and pictures."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from configs import base
from experiments import compact_demo, compact_report, data, pictures, report
from experiments.files import replaced
from experiments.seeds import History, mean_and_interval
from sparsejax.masks.layout import named_leaves


def table(history: History) -> str:
    """Return a Markdown table: accuracy, weights, sparsity and cost of each method.

    Args:
      history: rounds of the trainings by method, "dense" and "static" among them. A
        step's cost is taken from all rounds but the first, which compiles.
    """
    total = sum(mask[0].size for mask in _masks(history, "static").values())
    baseline = [done.seconds for done in history["dense"][1:]]
    rows = []
    for method, rounds in history.items():
        accuracy, interval = mean_and_interval(100 * rounds[-1].accuracies)
        masks = _masks(history, method).values()
        active = sum(int(mask[0].sum()) for mask in masks) if masks else total
        seconds = [done.seconds for done in rounds[1:]]
        low, cost, high = np.quantile(np.divide(seconds, baseline), (0.25, 0.5, 0.75))
        rows.append(
            (
                method,
                f"{accuracy:.2f} ± {interval:.2f}",
                f"{active:,} of {total:,}",
                f"{1 - active / total:.2%}",
                f"{1000 * np.median(seconds) / len(rounds[0].losses):.2f}",
                f"{cost:.2f} ({low:.2f} to {high:.2f})",
            )
        )
    header = ("method", "test accuracy, %", "active weights", "sparsity")
    return report.markdown_table((*header, "step, ms", "step / dense"), rows)


def gain(history: History) -> str:
    """Say how much better RigL does than a static mask, seed by seed."""
    difference = history["rigl"][-1].accuracies - history["static"][-1].accuracies
    mean, interval = mean_and_interval(100 * difference)
    return f"RigL minus static, seed by seed: {mean:+.2f} ± {interval:.2f} points."


def write(
    folder: pathlib.Path,
    config: base.Config,
    dataset: data.Dataset,
    history: History,
    first_masks: Any,
    verified: str,
    compacted: compact_demo.Compacted,
) -> None:
    """Write `report.md` and its pictures, which finishes a demo.

    Args:
      folder: where to.
      config: what the methods share.
      dataset: what they were trained on.
      history: rounds of the trainings by method.
      first_masks: of RigL, before the first step, [seeds, ...].
      verified: what was found about the checkpoint.
      compacted: what the first networks ended in.
    """
    last_masks = history["rigl"][-1].masks
    num_seeds = len(history["rigl"][-1].accuracies)
    first, last = (
        next(iter(named_leaves(masks).values())) for masks in (first_masks, last_masks)
    )
    together = lambda mask: np.concatenate(list(mask), axis=-1)
    figures = {
        "training": pictures.training(history),
        "layers": pictures.layers(history["magnitude"], history["rigl"], first_masks),
        "masks": pictures.masks(
            {"before training": first[0], "after training with RigL": last[0]}
        ),
        "connections": pictures.connections(
            dataset,
            {
                "weights before training": together(first),
                "weights after RigL": together(last),
            },
        ),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=110)

    device = jax.devices()[0].device_kind
    settings = json.dumps(dataclasses.asdict(config), indent=2)
    sections = [
        f"# Sparse training on {config.data.name}",
        f"{num_seeds} networks by each method, trained side by side for "
        f"{config.num_steps:,} steps of {config.batch_size} images and tested on "
        f"{dataset.num_test:,}. Seed by seed, methods share the first weights, the "
        "first masks and the order of the data; magnitude pruning starts dense.",
        table(history),
        gain(history),
        "± is half the width of a 95 % t-interval over seeds. Active weights are "
        "counted in the masks of the first network. A step is one of all "
        f"{num_seeds} networks at once, mask updates included: its median, and its "
        "ratio to the dense step of the same round, median and quartiles, on "
        f"{os.cpu_count()} cores, {device}, jax {jax.__version__}.",
        "## Training",
        "![training](training.png)",
        "## Layers",
        "![layers](layers.png)",
        "Of the first RigL network:",
        report.layer_table(jax.tree.map(lambda mask: mask[0], last_masks)),
        "## The first layer, before and after",
        "The mask of the first RigL network:",
        "![masks](masks.png)",
        f"How many first-layer weights of all {num_seeds} RigL networks look at each "
        "pixel:",
        "![connections](connections.png)",
        "## Small networks",
        *compact_report.sections(compacted),
        "## Checkpoint",
        verified,
        "## Config",
        "Of RigL; the others differ in `sparse.method` alone.",
        f"```json\n{settings}\n```",
    ]
    with replaced(folder / report.FILE_NAME) as file:
        file.write("\n\n".join(sections) + "\n")


def _masks(history: History, method: str) -> dict[str, np.ndarray]:
    return named_leaves(history[method][-1].masks)
