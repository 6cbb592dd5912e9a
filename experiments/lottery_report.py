"""The tables and the picture of a lottery: which tickets win, and what they save."""

import itertools
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from configs import base
from experiments import report, seeds
from experiments.comparison_report import fill, percent, versions, write_page
from experiments.kept_runs import Run
from experiments.lottery_masks import REINIT, STRUCTURED, TIMED
from experiments.lottery_measure import BATCH, ROUND_TO
from experiments.lottery_train import IMP, REWOUND

# Runs by round and branch, in the order of their seeds.
Table = Mapping[tuple[int, str], Sequence[Run]]

_MIN_STRUCTURED = 0.9
_MARKERS = "*os^DvP<>X"  # of branches


def by_setting(runs: Sequence[Run]) -> Table:
    """Group runs by round and branch."""
    table: dict[tuple[int, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run["round"], run["seed"])):
        table.setdefault((run["round"], run["branch"]), []).append(run)
    return table


def reaches(accuracies: np.ndarray, dense: np.ndarray) -> str:
    """Say whether accuracies are as good as the dense network's, both [seeds].

    "strict": their mean is no lower. "within std": no lower than the dense mean less
    one standard deviation of the dense network over seeds.
    """
    mean = accuracies.mean()
    if mean >= dense.mean():
        return "strict"
    return "within std" if mean >= dense.mean() - dense.std(ddof=1) else "no"


def verdict(runs: Sequence[Run], dense: Sequence[Run]) -> str:
    """Say whether a ticket wins: it reaches the dense accuracy and has structure."""
    if np.mean(_column(runs, "structured_fraction")) <= _MIN_STRUCTURED:
        return "no structure"
    return reaches(_column(runs, "test_accuracy"), _column(dense, "test_accuracy"))


def accuracy_table(table: Table) -> str:
    """Return what all networks reach."""
    dense = table[0, IMP]
    references = {
        name: _column(runs, "test_accuracy")
        for name, runs in _references(table).items()
    }
    rows = []
    for (index, branch), runs in table.items():
        accuracy = _column(runs, "test_accuracy")
        is_dense = runs is dense
        differences = [percent(accuracy - own, "+") for own in references.values()]
        rows.append(
            (
                str(index),
                "dense" if is_dense else branch,
                f"{_sparsity(runs):.1%}",
                f"{_column(runs, 'structured_fraction').mean():.0%}",
                percent(accuracy),
                *differences,
                "" if is_dense else reaches(accuracy, references["dense"]),
                verdict(runs, dense) if branch in STRUCTURED else "",
            )
        )
    header = ["round", "network", "sparsity", "in structure", "test accuracy, %"]
    header += [f"minus {name}, points" for name in references]
    header += ["as good as dense", "winning ticket"]
    return report.markdown_table(header, rows)


def winners_table(table: Table) -> str:
    """Return the sparsest ticket of each branch that wins, by what it is held against.

    The paper holds tickets against the dense network, which lacks their early steps.
    """
    rows = []
    for branch, (name, reference) in itertools.product(
        _branches(table), _references(table).items()
    ):
        of_branch = [runs for (_, own), runs in table.items() if own == branch]
        wins = [(verdict(runs, reference), runs) for runs in of_branch]
        cells = []
        for allowed in (("strict",), ("strict", "within std")):
            won = [runs for how, runs in wins if how in allowed]
            best = max(won, key=_sparsity, default=None)
            cells += ["none", ""] if best is None else [_told(best), _speed(best)]
        rows.append((branch, name, *cells))
    header = "ticket|beside|sparsest strict|times faster|sparsest within std"
    header += "|times faster"
    return report.markdown_table(header.split("|"), rows)


def time_table(table: Table) -> str:
    """Return what structured tickets cost, beside the dense network."""
    rows = []
    for (index, branch), runs in table.items():
        if branch not in TIMED:
            continue
        own, dense = np.mean([run["flops"] for run in runs], axis=0)
        times = [_medians(runs, "times", n) for n in ("dense", "best dense", "ticket")]
        ratios = [_medians(runs, "ratios", n) for n in ("dense", "best dense")]
        rows.append(
            (
                str(index),
                branch,
                f"{_sparsity(runs):.1%}",
                f"{own / dense:.1%}",
                *(f"{1e3 * seconds.mean():.2f}" for seconds in times),
                *(
                    "{:.2f} ± {:.2f}".format(*seeds.mean_and_interval(r))
                    for r in ratios
                ),
                f"{_column(runs, 'error').max():.0e}",
            )
        )
    header = "round|ticket|sparsity|FLOPs|dense, ms|best dense, ms|ticket, ms"
    header += "|faster than dense|faster than best dense|error"
    return report.markdown_table(header.split("|"), rows)


def forms_table(table: Table) -> str:
    """Return how the layers of structured tickets are executed, over seeds."""
    structured = {key: r for key, r in table.items() if key[1] in TIMED}
    layers = list(dict.fromkeys(p for r in structured.values() for p in r[0]["forms"]))
    rows = []
    for (index, branch), runs in structured.items():
        cells = []
        for layer in layers:
            counts = Counter(run["forms"].get(layer, "gone") for run in runs)
            loose = sum(layer not in run["structured"] for run in runs)
            told = [f"{form} {n}" for form, n in counts.most_common()]
            cells.append(", ".join(told) + (f" (loose {loose})" if loose else ""))
        rows.append((str(index), branch, *cells))
    names = [layer.removesuffix("/kernel") for layer in layers]
    return report.markdown_table(["round", "ticket", *names], rows)


def picture(table: Table) -> Figure:
    """Draw accuracy over density, and over the speed of what has structure."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    dense, rewound = (
        100 * _column(runs, "test_accuracy") for runs in _references(table).values()
    )
    for ax in panels:
        ax.axhline(dense.mean(), color="black", linewidth=1)
        ax.axhline(rewound.mean(), color="black", linewidth=1, linestyle=":")
        band = dense.mean() + dense.std(ddof=1) * np.array([-1, 1])
        ax.axhspan(*band, color="black", alpha=0.1, linewidth=0)
        ax.grid(alpha=0.3)
    names = list(dict.fromkeys(branch for index, branch in table if index))
    for number, branch in enumerate(names):
        of_branch = [r for (index, own), r in table.items() if own == branch and index]
        points = [
            seeds.mean_and_interval(100 * _column(runs, "test_accuracy"))
            for runs in of_branch
        ]
        mean, half = zip(*points, strict=True)
        style = {
            "fmt": _MARKERS[number % len(_MARKERS)] + "-",
            "color": f"C{number}",
            "mfc": "none" if branch.endswith(REINIT) else None,
            "linewidth": 0.8,
            "capsize": 2,
            "alpha": 0.85,
        }
        left = [100 * (1 - _sparsity(runs)) for runs in of_branch]
        panels[0].errorbar(left, mean, half, label=branch, **style)
        if branch in TIMED:
            speed = [_medians(r, "ratios", "best dense").mean() for r in of_branch]
            panels[1].errorbar(speed, mean, half, **style)
    panels[0].set_xscale("log")
    panels[0].xaxis.set_major_formatter("{x:g}")
    panels[0].invert_xaxis()
    panels[0].set_xlabel("weights that are left in the pruned layers, %")
    panels[1].set_xlabel(f"times faster than the best dense network, {BATCH} images")
    panels[0].set_ylabel("test accuracy, %")
    figure.legend(loc="outside right center")
    return figure


def write(
    out: pathlib.Path, config: base.Lottery, runs: Sequence[Run], *, command: str
) -> None:
    """Write OUT.md, OUT.json and OUT.png; keep what OUT.md says under "Reading"."""
    table = by_setting(runs)
    num_seeds = len({run["seed"] for run in runs})
    dense = table[0, IMP]
    about = f"""Means over {num_seeds} seeds with 95 % t-intervals; differences are
        paired by seed. Accuracy of the last step on the whole test set. Sparsity is of
        the {dense[0]["size"]:,} weights of the convolutions but the stem's; "in
        structure" is the part of them in layers that keep whole channels, or blocks.
        "strict": the mean is no lower than the dense mean; "within std": no lower than
        it less the dense network's standard deviation over seeds,
        {100 * _column(dense, "test_accuracy").std(ddof=1):.2f} points. A winning
        ticket is trained from the rewound weights, and has more than
        {_MIN_STRUCTURED:.0%} of the weights in structure. In the picture the line is
        the dense network with a band of one standard deviation, the dotted line
        {REWOUND}, and bars are intervals."""
    kinds = f"""imp: iterative magnitude pruning itself. refill: whole channels of each
        layer, as many as its weights fill, and all that takes part in the others
        masked, so that they can be removed; it is therefore sparser than the round.
        refill+: {config.extra:.0%} of the others, too. regroup: blocks of rows with
        columns in common, {config.groups} groups a layer, with the columns chosen as in
        the paper's code ("stale"); regroup-exact by its rule, regroup-count by the
        columns' density, regroup-random with groups at random. {REINIT}: the same
        masks, and weights drawn anew. random: as many weights in each layer as imp, at
        random places. dense-rewound: all weights, from the snapshot, the control for
        its steps, which all tickets have in addition."""
    times = f"""{BATCH} images, the networks called in turn; medians of all calls, means
        over the seeds, intervals over the seeds. "dense" is XLA's convolutions; in
        "best dense" and in the tickets each layer has the form that was measured to be
        best for it, which for a layer without blocks may be a product with the unfolded
        images. Refilled tickets are compacted, to channels in multiples of
        {ROUND_TO} where dead ones allow it. FLOPs are of the executed contractions,
        relative to the dense network's. Error: the largest difference of logits to the
        masked network, relative to the largest logit. Unstructured networks (imp,
        random) run as the dense one does: 1."""
    forms = """The form of each layer, and for how many seeds. "dense" and "unfolded"
        compute all weights of what is left of a layer: there the cost of blocks would
        be higher. Layers marked "loose" are not in structure, for so many seeds: no
        blocks were found, or channels go with those of a layer that is not pruned."""
    sections = [
        f"# Structural lottery tickets, {config.model.name} of depth "
        f"{config.model.depth} and width {config.model.width} on {config.data.name}",
        f"    {command}",
        winners_table(table),
        f"![Accuracy over sparsity and speed]({out.name}.png)",
        "## Accuracy",
        accuracy_table(table),
        fill(about),
        fill(kinds),
        "## Time",
        time_table(table),
        fill(times),
        "## Forms",
        forms_table(table),
        fill(forms),
        "## Recipe",
        fill(f"{_recipe(config)} {versions()}"),
    ]
    write_page(out, config, sections, runs, command)
    picture(table).savefig(out.with_suffix(".png"), dpi=110)


def _recipe(config: base.Lottery) -> str:
    o = config.optimizer
    falls = (
        "a cosine to 0"
        if o.decay == "cosine"
        else f"a factor {o.factor:g} at the steps {', '.join(map(str, o.at))}"
    )
    return f"""Recipe of all: {config.num_steps} steps of {config.batch_size} images,
        {o.name} at {o.learning_rate:g}, {o.warmup_steps} steps of warm-up and {falls},
        Nesterov momentum {o.momentum:g}, weight decay {o.weight_decay:g}.
        {config.rounds} prunings of {config.rate:.0%} of the weights that are left, of
        all layers together. Networks go back to step
        {round(config.rewind_fraction * config.num_steps)} of the dense training, and
        train for all steps from there, with an empty momentum and the learning rate
        and images from the start, as in the paper's code."""


def _references(table: Table) -> dict[str, Sequence[Run]]:
    """Return the networks with all weights that others are held against."""
    return {"dense": table[0, IMP], REWOUND: table[0, REWOUND]}


def _branches(table: Table) -> list[str]:
    return list(dict.fromkeys(branch for _, branch in table if branch in STRUCTURED))


def _column(runs: Sequence[Run], name: str) -> np.ndarray:
    return np.array([run[name] for run in runs])


def _sparsity(runs: Sequence[Run]) -> float:
    return float(1 - (_column(runs, "active") / _column(runs, "size")).mean())


def _medians(runs: Sequence[Run], field: str, network: str) -> np.ndarray:
    return np.array([run[field][network][0] for run in runs])


def _told(runs: Sequence[Run]) -> str:
    return f"{_sparsity(runs):.1%} (round {runs[0]['round']})"


def _speed(runs: Sequence[Run]) -> str:
    if runs[0]["branch"] not in TIMED:
        return ""
    return f"{_medians(runs, 'ratios', 'best dense').mean():.2f}"
