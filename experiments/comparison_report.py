"""The table of a comparison: means over seeds, with intervals."""

import dataclasses
import importlib.metadata
import json
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from configs import base
from experiments import report, seeds
from experiments.files import replaced

METHODS = ("static", "set", "rigl", "magnitude", "dense")
_READING = "\n## Reading\n"

# What one seed of one method at one sparsity came to.
Run = dict[str, Any]


def table(runs: Sequence[Run]) -> str:
    """Return the results as a Markdown table, a line for each method and sparsity."""
    groups: dict[tuple[float, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["sparsity"], run["method"]), []).append(run)
    rows = []
    for (sparsity, method), group in sorted(
        groups.items(), key=lambda item: (item[0][0], METHODS.index(item[0][1]))
    ):
        static = groups.get((sparsity, "static"), [])
        accuracy, reference = (
            np.array([run["test_accuracy"] for run in part]) for part in (group, static)
        )
        is_paired = method != "static" and len(reference)
        column = lambda name, group=group: np.mean([run[name] for run in group], axis=0)
        active, size = group[0]["active"], group[0]["size"]
        rows.append(
            (
                f"{1 - active / size:.4%}",
                method,
                percent(accuracy),
                percent(accuracy - reference, "+") if is_paired else "",
                f"{column('train_loss'):.3f}",
                f"{active:,}",
                f"{column('pixels'):.0f}",
                f"{column('share_on_varied_pixels'):.0%}",
                ", ".join(f"{n:.0f}" for n in column("neurons")),
                f"{group[0]['minutes']:.1f}",
            )
        )
    return report.markdown_table(
        (
            "sparsity",
            "method",
            "test accuracy, %",
            "minus static, points",
            "training loss",
            "weights",
            "pixels in use",
            "on varied pixels",
            "neurons in use",
            "minutes",
        ),
        rows,
    )


def percent(values: np.ndarray, sign: str = "") -> str:
    """Return the mean of shares and the half-width of its interval, in percent."""
    mean, half = seeds.mean_and_interval(100 * values)
    return f"{mean:{sign}.2f} ± {half:.2f}"


def fill(paragraph: str) -> str:
    """Return a paragraph in lines of the length that the repository has."""
    return textwrap.fill(" ".join(paragraph.split()), 88, break_on_hyphens=False)


def write(
    out: pathlib.Path,
    config: base.Config,
    runs: Sequence[Run],
    *,
    command: str,
    initial: str,
) -> None:
    """Write OUT.json and OUT.md; keep what OUT.md says under "Reading"."""
    num_seeds = len({run["seed"] for run in runs})
    hidden = "-".join(map(str, config.model.widths))
    about = f"""Means over {num_seeds} seeds with 95 % t-intervals; "minus static" is
        paired by seed, which shares its first weights, first mask and batches. Accuracy
        of the last step on the whole test set; training loss over the last tenth of the
        steps. "In use" has a connection to what follows (a neuron also to what
        precedes); "on varied pixels" is the share of the first layer's weights at the
        half of the pixels that vary most. Minutes are those of a method, all its
        sparsities and seeds together."""
    drops = f"""first weights under a mask: {initial}; SET and RigL drop
        {config.sparse.drop_fraction:.0%} at first and less by a cosine."""
    sections = [
        f"# An MLP with {hidden} hidden units on {config.data.name}",
        f"    {command}",
        table(runs),
        fill(about),
        fill(f"{recipe(config)}; {drops} {versions()}"),
    ]
    write_page(out, config, sections, runs, command)


def recipe(config: base.Config) -> str:
    """Say how all runs of a comparison were trained."""
    o, s = config.optimizer, config.sparse
    momentum = f", Nesterov momentum {o.momentum:g}" if o.name == "sgd" else ""
    return f"""Recipe of all: {config.num_steps} steps of {config.batch_size} images,
        {o.name} at {o.learning_rate:g}{momentum}, weight decay {o.weight_decay:g},
        {o.warmup_steps} steps of warm-up and a cosine to 0; distribution
        {s.distribution}; masks change every {s.update_every} steps until step
        {round(s.stop_fraction * config.num_steps)}"""


def versions() -> str:
    """Say which versions of the libraries are installed."""
    return f"Versions: {', '.join(f'{n} {v}' for n, v in _versions().items())}."


def _versions() -> dict[str, str]:
    names = ("jax", "flax", "optax", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def write_page(
    out: pathlib.Path,
    config: base.Config,
    sections: Sequence[str],
    runs: Sequence[Run],
    command: str,
) -> None:
    """Write OUT.md of sections, and OUT.json; keep what OUT.md has under "Reading"."""
    text = "\n\n".join(sections) + "\n"
    path = out.with_suffix(".md")
    _, heading, kept = (path.read_text() if path.exists() else "").partition(_READING)
    raw = {
        "command": command,
        "versions": _versions(),
        "config": dataclasses.asdict(config),
        "runs": runs,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as file:
        file.write(text + heading + kept)
    with replaced(out.with_suffix(".json")) as file:
        file.write(json.dumps(raw, indent=1) + "\n")
    print(text)
