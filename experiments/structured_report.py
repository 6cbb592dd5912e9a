"""The tables and the picture of a structured comparison: means over seeds."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from configs import base
from experiments import report, seeds
from experiments.comparison_report import fill, percent, recipe, versions, write_page
from experiments.structured_measure import BATCHES, ROUND_TO
from experiments.structured_runs import METHODS, Run

# Runs of one setting, a seed each, by sparsity and label.
Groups = Mapping[tuple[float, str], Sequence[Run]]

_MARKERS = "*Xosd^><"  # of settings
_COLORS = ("#000000", "#7b2d8e", "#1f77b4", "#d55e00")  # of sparsities


def by_setting(runs: Sequence[Run]) -> Groups:
    """Group runs in the order of their sparsities and of `METHODS`."""
    rank = lambda sparse: (sparse["sparsity"], METHODS.index(sparse["method"]))
    groups: dict[tuple[float, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (rank(run["sparse"]), run["seed"])):
        sparse = run["sparse"]
        groups.setdefault((sparse["sparsity"], label(sparse)), []).append(run)
    return groups


def label(sparse: Mapping[str, Any]) -> str:
    """Return what a setting is called in a table."""
    if sparse["method"] == "srigl":
        return f"srigl, gamma {sparse['gamma']:g}"
    if sparse["method"] == "chase":
        return f"chase, {sparse['channel_sparsity']:.0%} removed"
    return sparse["method"]


def accuracy_table(groups: Groups) -> str:
    """Return what the methods reach, and how large the compacted networks are."""
    rows = []
    for (sparsity, name), runs in groups.items():
        rigl = groups.get((sparsity, "rigl"), [])
        accuracy, reference = (_column(part, "test_accuracy") for part in (runs, rigl))
        is_paired = name != "rigl" and len(reference)
        rows.append(
            (
                f"{sparsity:.0%}",
                name,
                percent(accuracy),
                percent(accuracy - reference, "+") if is_paired else "",
                f"{_mean(runs, 'train_loss'):.3f}",
                f"{_mean(runs, 'active'):,.0f}",
                "{:.0f} of {:.0f}".format(*np.mean([_channels(r) for r in runs], 0)),
                f"{_mean(runs, 'parameters')[1]:,.0f}",
                f"{_mean(runs, 'flops')[1] / 1e6:.2f}",
                f"{_column(runs, 'error').max():.0e}",
            )
        )
    header = "sparsity|method|test accuracy, %|minus rigl, points|training loss|weights"
    header += "|channels|parameters|MFLOPs|error"
    return report.markdown_table(header.split("|"), rows)


def time_table(groups: Groups) -> str:
    """Return how long networks take, and how much faster compaction makes them."""
    header = ["sparsity", "method"]
    for size in BATCHES:
        header += [f"batch {size}: masked, µs", "compacted, µs", "ratio"]
        header += [f"multiples of {ROUND_TO}, µs", "ratio"]
    rows = []
    for (sparsity, name), runs in groups.items():
        cells = [f"{sparsity:.0%}", name]
        for size in BATCHES:
            cells.append(_microseconds(runs, size, "masked"))
            for network in ("compacted", "rounded"):
                ratio = _medians(runs, "ratios", size, network)
                cells.append(_microseconds(runs, size, network))
                cells.append("{:.2f} ± {:.2f}".format(*seeds.mean_and_interval(ratio)))
        rows.append(cells)
    return report.markdown_table(header, rows)


def counts_table(groups: Groups, field: str) -> str:
    """Return how many are alive of what a field of the runs counts, by name."""
    first = next(iter(groups.values()))[0][field]
    header = [
        "sparsity",
        "method",
        *(f"{name} ({n})" for name, (_, n) in first.items()),
    ]
    rows = [
        (
            f"{sparsity:.0%}",
            name,
            *(f"{np.mean([run[field][key][0] for run in runs]):.1f}" for key in first),
        )
        for (sparsity, name), runs in groups.items()
    ]
    return report.markdown_table(header, rows)


def picture(groups: Groups) -> Figure:
    """Draw the accuracy over what compaction gives: speed, and fewer channels."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(name for _, name in groups))
    sparsities = list(dict.fromkeys(sparsity for sparsity, _ in groups))
    for (sparsity, name), runs in groups.items():
        mean, half = seeds.mean_and_interval(100 * _column(runs, "test_accuracy"))
        ratio = _medians(runs, "ratios", BATCHES[-1], "rounded").mean()
        left, _ = np.mean([_channels(run) for run in runs], axis=0)
        for ax, x in zip(panels, (ratio, left), strict=True):
            ax.errorbar(
                x,
                mean,
                half,
                fmt=_MARKERS[names.index(name)],
                color=_COLORS[sparsities.index(sparsity)],
                markersize=7,
                capsize=2,
                alpha=0.85,
            )
    speed = f"times faster, {BATCHES[-1]} images, channels in multiples of {ROUND_TO}"
    for ax, title in zip(panels, (speed, "channels left"), strict=True):
        ax.set_xlabel(title)
        ax.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    handles = [
        *(
            Line2D([], [], ls="", marker=m, color="grey", label=name)
            for m, name in zip(_MARKERS, names, strict=False)
        ),
        *(
            Patch(color=c, label=f"{s:.0%} sparsity")
            for c, s in zip(_COLORS, sparsities, strict=False)
        ),
    ]
    figure.legend(handles=handles, loc="outside right center")
    return figure


def write(
    out: pathlib.Path, config: base.Config, runs: Sequence[Run], *, command: str
) -> None:
    """Write OUT.md, OUT.json and OUT.png; keep what OUT.md says under "Reading"."""
    groups = by_setting(runs)
    num_seeds = len({run["seed"] for run in runs})
    about = f"""Means over {num_seeds} seeds with 95 % t-intervals; "minus rigl" is
        paired by seed, at the same sparsity. Accuracy of the last step on the whole
        test set; training loss over the last tenth of the steps. Channels, parameters
        and MFLOPs of an image (a multiply-add counts as two) are those that
        `compaction.compact` leaves; channels are those of all groups that can shrink.
        Error: the largest difference between the logits of the masked and of the
        compacted network over the test images and seeds, relative to the largest
        logit."""
    times = f"""The networks are called in turn: as masked, compacted, and compacted
        with `round_to={ROUND_TO}`. Medians of all calls, means over the seeds of these
        and of the median ratio of the masked network's time to the compacted one's,
        whose interval is over seeds. Weights are arguments of the compiled call. What
        loses no channel should have the ratio 1."""
    alive = """What compaction leaves of each group of channels, by the layer that first
        produces it; all layers that write into a residual stream share one group."""
    neurons = "Neurons with at least one active weight, by layer."
    drops = f"""{config.sparse.drop_fraction:.0%} of the weights dropped at first and
        less by a cosine, chase in its last phase alone; it also holds up to 5 % of all
        weights beyond its budget until removal ends, channels going every
        {config.sparse.remove_every} steps. srigl and chase mask scales and shifts of
        norms with their channels. First weights under a mask:
        {config.sparse.initial}."""
    sections = [
        f"# Structured sparse training of {config.model.name}, depth "
        f"{config.model.depth} and width {config.model.width}, on {config.data.name}",
        f"    {command}",
        accuracy_table(groups),
        fill(about),
        f"![Accuracy over speed and channels left]({out.name}.png)",
        "## Time",
        time_table(groups),
        fill(times),
        "## Channels",
        counts_table(groups, "channels"),
        fill(alive),
        "## Neurons",
        counts_table(groups, "neurons"),
        fill(neurons),
        "## Recipe",
        fill(f"{recipe(config)}. {drops} {versions()}"),
    ]
    write_page(out, config, sections, runs, command)
    picture(groups).savefig(out.with_suffix(".png"), dpi=110)


def _medians(runs: Sequence[Run], field: str, size: int, network: str) -> np.ndarray:
    return np.array([run[field][size][network][0] for run in runs])


def _microseconds(runs: Sequence[Run], size: int, network: str) -> str:
    return f"{1e6 * _medians(runs, 'times', size, network).mean():,.0f}"


def _column(runs: Sequence[Run], name: str) -> np.ndarray:
    return np.array([run[name] for run in runs])


def _mean(runs: Sequence[Run], name: str) -> Any:
    return _column(runs, name).mean(axis=0)


def _channels(run: Run) -> np.ndarray:
    """Return how many channels are left, and how many there were."""
    return np.sum(list(run["channels"].values()), axis=0)
