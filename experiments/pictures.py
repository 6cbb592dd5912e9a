"""Pictures that compare methods, layers, and masks before with masks after training."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from experiments import data, report
from experiments.seeds import History, Round, mean_and_interval
from sparsejax import analysis
from sparsejax.masks.layout import named_leaves

# From dark to light, so that lines differ in grey too.
_LINES = {
    "color": ["#000000", "#7b2d8e", "#1f77b4", "#d55e00", "#9aa62b"],
    "linestyle": ["-", "--", "-.", "-", ":"],
}


def training(history: History) -> Figure:
    """Draw loss and test error over the steps, a line for each method.

    Args:
      history: rounds of the trainings by method, five at most.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, errors = figure.subplots(1, 2)
    for ax in (losses, errors):
        ax.set_prop_cycle(**_LINES)
        ax.set_yscale("log")
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
    for method, rounds in history.items():
        steps = [done.step for done in rounds]
        losses.plot(steps, [done.losses.mean() for done in rounds], marker=".")
        mean, interval = np.transpose(
            [mean_and_interval(1 - done.accuracies) for done in rounds]
        )
        (line,) = errors.plot(steps, mean, marker=".", label=method)
        band = mean - interval, mean + interval
        errors.fill_between(steps, *band, color=line.get_color(), alpha=0.15, lw=0)
    losses.set_title("training loss, mean of a round")
    errors.set_title("test error, with 95 % interval over seeds")
    errors.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    errors.yaxis.set_major_formatter("{x:.0%}")
    errors.yaxis.set_minor_formatter(NullFormatter())
    errors.legend()
    return figure


def layers(pruned: Sequence[Round], moved: Sequence[Round], first_masks: Any) -> Figure:
    """Draw what happens to the layers under magnitude pruning and under RigL.

    Args:
      pruned: rounds of magnitude pruning.
      moved: rounds of RigL.
      first_masks: of RigL, before the first step.
    """
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    at_the_end, over_time, replaced = figure.subplots(1, 3)
    for ax in (over_time, replaced):
        ax.set_prop_cycle(**_LINES)
        ax.grid(alpha=0.3)
        ax.yaxis.set_major_formatter("{x:.0%}")

    after = [named_leaves(done.masks) for done in moved]
    analysis.plot_densities(jax.tree.map(np.mean, after[-1]), ax=at_the_end)
    at_the_end.set_title("rigl: density at the end")

    densities = [
        {"step": done.step, **jax.tree.map(np.mean, named_leaves(done.masks))}
        for done in pruned
    ]
    report.plot_history(densities, list(after[-1]), ax=over_time)
    over_time.set_title("magnitude: density over time")

    before = [named_leaves(first_masks), *after[:-1]]
    new = [
        {"step": done.step, **jax.tree.map(_new, old, now)}
        for done, old, now in zip(moved, before, after, strict=True)
    ]
    report.plot_history(new, list(after[-1]), ax=replaced)
    replaced.set_title("rigl: weights replaced by an update")
    return figure


def _new(before: np.ndarray, after: np.ndarray) -> float:
    """Return the part of the active weights that was not active before."""
    return (after & ~before).sum() / after.sum()


def masks(named: Mapping[str, np.ndarray]) -> Figure:
    """Draw masks one below the other, a column for each neuron.

    Args:
      named: by title, bool [..., neurons].
    """
    figure = Figure(figsize=(10, 3 * len(named)), layout="constrained")
    axes = figure.subplots(len(named), 1, squeeze=False).flat
    for ax, (title, mask) in zip(axes, named.items(), strict=True):
        analysis.plot_mask(mask, ax=ax).set_title(title)
    return figure


def connections(dataset: data.Dataset, named: Mapping[str, np.ndarray]) -> Figure:
    """Draw how much each pixel varies, and how many first-layer weights look at it.

    Args:
      dataset: images of one size.
      named: by title, bool [height * width * channels, neurons].
    """
    figure = Figure(figsize=(3.4 * (1 + len(named)), 3), layout="constrained")
    variation, *axes = figure.subplots(1, 1 + len(named))
    deviation = dataset.train.images.std(axis=0).mean(axis=-1)
    picture = variation.imshow(deviation, cmap="Greys", vmin=0)
    figure.colorbar(picture, ax=variation, label="standard deviation, of 255")
    variation.set_title("how much each pixel varies")
    most = max(
        mask.reshape(*dataset.image_shape, -1).sum(axis=(-2, -1)).max()
        for mask in named.values()
    )
    for ax, (title, mask) in zip(axes, named.items(), strict=True):
        analysis.plot_input_connections(mask, dataset.image_shape, vmax=most, ax=ax)
        ax.set_title(title)
    for ax in (variation, *axes):
        ax.set_xticks([])
        ax.set_yticks([])
    return figure
