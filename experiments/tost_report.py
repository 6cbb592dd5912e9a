"""The tables and the picture of a ToST comparison: means over seeds."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from configs import base
from experiments import report, seeds
from experiments.comparison_report import fill, percent, versions, write_page
from experiments.kept_runs import Run

# Runs by sparsity, source, trick and seed.
Table = Mapping[tuple[float, str, str], Mapping[int, Run]]

_MARKERS = "os^Dv*"  # of sources


def by_setting(runs: Sequence[Run]) -> Table:
    """Group runs in the order in which sparsities, sources and tricks come up."""
    table: dict[tuple[float, str, str], dict[int, Run]] = {}
    for run in runs:
        key = (run["sparsity"], run["source"], run["trick"])
        table.setdefault(key, {})[run["seed"]] = run
    return table


def tricks_of(table: Table) -> list[str]:
    """Return the names of the tricks; "vanilla" is none."""
    names = dict.fromkeys(trick for *_, trick in table)
    return [name for name in names if name != "vanilla"]


def accuracy_table(table: Table) -> str:
    """Return what the networks reach, a line for each mask."""
    tricks = ["vanilla", *tricks_of(table)]
    rows = [
        [
            f"{sparsity:.0%}",
            source,
            *(
                percent(_accuracy(table[sparsity, source, trick]))
                if (sparsity, source, trick) in table
                else ""
                for trick in tricks
            ),
        ]
        for sparsity, source in _masks(table)
    ]
    return report.markdown_table(["sparsity", "mask", *tricks], rows)


def difference_table(table: Table) -> str:
    """Return what each trick adds to training without, paired by seed."""
    tricks = tricks_of(table)
    rows = [
        [
            f"{sparsity:.0%}",
            source,
            *(
                percent(_differences(table, sparsity, source, trick), "+")
                for trick in tricks
            ),
        ]
        for sparsity, source in _sparse_masks(table)
    ]
    return report.markdown_table(["sparsity", "mask", *tricks], rows)


def effect_table(table: Table) -> str:
    """Return what each trick adds on average over masks, by sparsity and in all.

    The mean over masks is taken within a seed first: what one seed's runs share counts
    once. The last column counts the runs that are better with the trick.
    """
    sparsities = list(dict.fromkeys(s for s, _ in _sparse_masks(table)))
    header = [f"{sparsity:.0%}" for sparsity in sparsities]
    rows = []
    for trick in tricks_of(table):
        found = {
            (sparsity, source): _differences(table, sparsity, source, trick)
            for sparsity, source in _sparse_masks(table)
        }
        at = lambda sparsity, found=found: np.mean(
            [d for (own, _), d in found.items() if own == sparsity], axis=0
        )
        every = np.array(list(found.values()))
        rows.append(
            [
                trick,
                *(percent(at(sparsity), "+") for sparsity in sparsities),
                percent(every.mean(axis=0), "+"),
                f"{(every > 0).sum()} of {every.size}",
            ]
        )
    return report.markdown_table(["trick", *header, "all", "better"], rows)


def cost_table(table: Table, config: base.ToST) -> str:
    """Return what each trick costs in training."""
    rows = []
    plain = _seconds(table, "vanilla", config)
    for trick in ["vanilla", *tricks_of(table)]:
        of_trick = _runs(table, trick)
        start = np.median([run["seconds"]["start"] for run in of_trick])
        stages = [_step(of_trick, stage) for stage in ("ghosted", "plain")]
        rows.append(
            [
                trick,
                f"{of_trick[0]['ghost_parameters']:,}",
                f"{start:.1f}",
                *("" if step is None else f"{1e3 * step:.1f}" for step in stages),
                f"{_seconds(table, trick, config) / plain:.2f}",
            ]
        )
    header = "trick|ghost parameters|start, s|step with ghosts, ms|step, ms|time"
    return report.markdown_table(header.split("|"), rows)


def picture(table: Table) -> Figure:
    """Draw what each trick adds, a panel for each sparsity."""
    sparsities = list(dict.fromkeys(s for s, _ in _sparse_masks(table)))
    sources = list(dict.fromkeys(source for _, source in _sparse_masks(table)))
    tricks = tricks_of(table)
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, len(sparsities), sharey=True, squeeze=False)[0]
    for ax, sparsity in zip(panels, sparsities, strict=True):
        for index, source in enumerate(sources):
            points = [
                seeds.mean_and_interval(
                    100 * _differences(table, sparsity, source, trick)
                )
                for trick in tricks
            ]
            shift = 0.12 * (index - (len(sources) - 1) / 2)
            mean, half = zip(*points, strict=True)
            ax.errorbar(
                np.arange(len(tricks)) + shift,
                mean,
                half,
                fmt=_MARKERS[index % len(_MARKERS)],
                capsize=2,
                label=source,
            )
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_xticks(range(len(tricks)), tricks, rotation=30)
        ax.set_title(f"{sparsity:.0%} sparsity")
        ax.grid(alpha=0.3, axis="y")
    panels[0].set_ylabel("points of test accuracy over vanilla")
    panels[-1].legend()
    return figure


def write(
    out: pathlib.Path, config: base.ToST, runs: Sequence[Run], *, command: str
) -> None:
    """Write OUT.md, OUT.json and OUT.png; keep what OUT.md says under "Reading"."""
    table = by_setting(runs)
    num_seeds = len({run["seed"] for run in runs})
    vanilla = _runs(table, "vanilla")
    counts = ", ".join(
        f"{s:.0%}: {n:,}"
        for s, n in dict.fromkeys((run["sparsity"], run["active"]) for run in vanilla)
    )
    about = f"""Test accuracy in percent, means over {num_seeds} seeds with 95 %
        t-intervals, of the last step on the whole test set. Active weights of
        {vanilla[0]["size"]:,}, convolutions and head, by sparsity: {counts}. Random
        masks are distributed by ERK, the others rank all weights together; all are
        found before training."""
    paired = """Points of test accuracy over the same mask without the trick, paired by
        seed, which shares first weights, mask and batches."""
    pooled = """The same, averaged over masks within each seed; intervals are over the
        seeds. "Better" counts runs."""
    costs = """Ghosts are there in training alone, and their parameters are dense. The
        start is what comes before the first step: ghosts and rescaling. Medians over
        all runs; "time" is that of start and steps together, relative to vanilla,
        without compilation."""
    o = config.optimizer
    how = f"""Recipe of all: {config.num_steps} steps of {config.batch_size} images,
        {o.name} at {o.learning_rate:g} (times {o.factor:g} at the steps
        {", ".join(map(str, o.at))}), Nesterov momentum {o.momentum:g}, weight decay
        {o.weight_decay:g} of all parameters. neurons: {config.neurons}. Ghosts fade
        linearly until step {round(config.ghost_fraction * config.num_steps)}.
        smoothing: {config.label_smoothing:g}. rescaling:
        {config.rescale_iterations} iterations, batches of
        {config.rescale_batch_size}, the gradient of pruned weights masked."""
    sections = [
        f"# ToST, {config.model.name} of depth {config.model.depth} and width "
        f"{config.model.width} on {config.data.name}",
        f"    {command}",
        accuracy_table(table),
        fill(about),
        "## What a trick adds",
        difference_table(table),
        fill(paired),
        f"![What each trick adds]({out.name}.png)",
        "## On average over masks",
        effect_table(table),
        fill(pooled),
        "## Cost",
        cost_table(table, config),
        fill(costs),
        "## Recipe",
        fill(f"{how} {versions()}"),
    ]
    write_page(out, config, sections, runs, command)
    picture(table).savefig(out.with_suffix(".png"), dpi=110)


def _masks(table: Table) -> list[tuple[float, str]]:
    found = dict.fromkeys((sparsity, source) for sparsity, source, _ in table)
    return sorted(found, key=lambda mask: mask[0])


def _sparse_masks(table: Table) -> list[tuple[float, str]]:
    return [mask for mask in _masks(table) if mask[0]]


def _accuracy(runs: Mapping[int, Run]) -> np.ndarray:
    return np.array([run["test_accuracy"] for _, run in sorted(runs.items())])


def _differences(table: Table, sparsity: float, source: str, trick: str) -> np.ndarray:
    """Return what a trick adds under one mask source, [seeds]."""
    return _accuracy(table[sparsity, source, trick]) - _accuracy(
        table[sparsity, source, "vanilla"]
    )


def _runs(table: Table, trick: str) -> list[Run]:
    return [
        run
        for (*_, own), runs in table.items()
        if own == trick
        for run in runs.values()
    ]


def _step(runs: Sequence[Run], stage: str) -> float | None:
    """Return the median seconds of a step in a stage; None where there is none."""
    seconds = [run["seconds"][stage] for run in runs]
    return float(np.median(seconds)) if None not in seconds else None


def _seconds(table: Table, trick: str, config: base.ToST) -> float:
    """Return the seconds of a run, from medians."""
    runs = _runs(table, trick)
    ghosted, plain = (_step(runs, stage) for stage in ("ghosted", "plain"))
    assert plain is not None
    n = round(config.ghost_fraction * config.num_steps) if ghosted is not None else 0
    start = float(np.median([run["seconds"]["start"] for run in runs]))
    return start + n * (ghosted or 0.0) + (config.num_steps - n) * plain
