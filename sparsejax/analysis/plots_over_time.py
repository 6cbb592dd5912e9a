"""Pictures of what training does to masks, the steps from left to right."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sparsejax.analysis import _style
from sparsejax.analysis.neurons import births_and_deaths

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_neurons(
    fan_in: np.ndarray, steps: Sequence[int], *, ax: "Axes | None" = None
) -> "Axes":
    """Draw the fan-in of every neuron over the steps, a row each.

    The darker, the more weights; where a neuron has none it is orange. Those that live
    to the end are below, by their last fan-in, and above them come the dead, the last
    to die first.

    Args:
      fan_in: int [steps, neurons], as from `fan_in_over_time`.
      steps: the steps.
      ax: where to draw; new axes by default.

    Returns:
      The axes.

    Raises:
      ValueError: there is not one row for each step.

    Example:
      >>> import numpy as np
      >>> from matplotlib.figure import Figure
      >>> from sparsejax import analysis
      >>> fan_in = np.array([[1, 1, 2], [3, 0, 1]])
      >>> ax = analysis.plot_neurons(fan_in, [0, 100], ax=Figure().subplots())
      >>> ax.get_xlabel(), ax.get_ylabel()
      ('step', 'neuron')
    """
    _check_steps("plot_neurons(fan_in)", fan_in, steps)
    ax = _style.axes(ax)
    lived = len(fan_in) - np.argmax(fan_in[::-1] > 0, axis=0)
    lived = np.where((fan_in > 0).any(axis=0), lived, 0)
    order = np.lexsort((-fan_in[-1], -lived))
    rows = np.ma.masked_equal(fan_in[:, order].T, 0)
    picture = ax.pcolormesh(
        steps, np.arange(len(rows)), rows, cmap="Blues", norm="log", shading="nearest"
    )
    most = max(1, fan_in.max())
    picture.set_clim(0.5, most)  # so that a single weight is not white
    ax.set_facecolor((_style.DEAD, 0.6))
    ticks = [n for e in range(len(str(most))) for n in (10**e, 2 * 10**e, 5 * 10**e)]
    bar = ax.figure.colorbar(picture, ax=ax, label="fan-in", format="{x:g}")
    bar.set_ticks([n for n in ticks if n <= most])
    bar.minorticks_off()
    ax.set_xlabel("step")
    ax.set_ylabel("neuron")
    return ax


def plot_births_and_deaths(
    live: np.ndarray, steps: Sequence[int], *, ax: "Axes | None" = None
) -> "Axes":
    """Draw how many neurons begin to live, upwards, and die, downwards.

    Args:
      live: bool [steps, neurons], such as whether a fan-in is above 0.
      steps: the steps.
      ax: where to draw; new axes by default.

    Returns:
      The axes.

    Raises:
      ValueError: there is not one row for each step.

    Example:
      >>> import numpy as np
      >>> from matplotlib.figure import Figure
      >>> from sparsejax import analysis
      >>> live = np.array([[True, True], [True, False], [True, True]])
      >>> ax = Figure().subplots()
      >>> _ = analysis.plot_births_and_deaths(live, [0, 100, 200], ax=ax)
      >>> [text.get_text() for text in ax.get_legend().get_texts()]
      ['births: 1', 'deaths: 1']
    """
    _check_steps("plot_births_and_deaths(live)", live, steps)
    ax = _style.axes(ax)
    births, deaths = births_and_deaths(live)
    width = 0.8 * np.diff(steps)
    for counts, name, color in (
        (births, "births", _style.ACTIVE),
        (-deaths, "deaths", _style.DEAD),
    ):
        label = f"{name}: {abs(counts.sum())}"
        ax.bar(steps[1:], counts, width=width, color=color, label=label)
    ax.axhline(0, color="black", linewidth=0.8)
    up, down = births.max(initial=0), deaths.max(initial=0)
    room = 0.1 * max(1, up, down)
    ax.set_ylim(-down - room, up + room)
    ax.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    ax.set_xlabel("step")
    ax.set_ylabel("neurons")
    ax.legend(frameon=False)
    return ax


def plot_weights(
    active: Mapping[str, np.ndarray],
    steps: Sequence[int],
    *,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw how many weights are active over the steps, the layers one on the other.

    Args:
      active: int [steps] by layer, drawn from below.
      steps: the steps.
      ax: where to draw; new axes by default.

    Returns:
      The axes.

    Raises:
      ValueError: a layer has not one number for each step.

    Example:
      >>> import numpy as np
      >>> from matplotlib.figure import Figure
      >>> from sparsejax import analysis
      >>> active = {"fc": np.array([90, 80]), "head": np.array([10, 20])}
      >>> ax = analysis.plot_weights(active, [0, 100], ax=Figure().subplots())
      >>> ax.get_ylabel()
      'active weights'
    """
    for name, counts in active.items():
        _check_steps(f"plot_weights(active): {name}", counts, steps)
    ax = _style.axes(ax)
    colors = _style.shades(len(active))
    ax.stackplot(steps, *active.values(), labels=list(active), colors=colors)
    ax.set_xlabel("step")
    ax.set_ylabel("active weights")
    most = np.sum(list(active.values()), axis=0).max()
    ax.set_ylim(0, 1.4 * most)  # room for the legend
    ax.legend(reverse=True, loc="upper right")
    return ax


def plot_overlap(
    overlap: np.ndarray, steps: Sequence[int], *, ax: "Axes | None" = None
) -> "Axes":
    """Draw how much the masks of every two steps have in common.

    Args:
      overlap: float [steps, steps] in [0, 1], as from `mask_overlap`.
      steps: the steps.
      ax: where to draw; new axes by default.

    Returns:
      The axes.

    Raises:
      ValueError: there is not one row for each step.

    Example:
      >>> import numpy as np
      >>> from matplotlib.figure import Figure
      >>> from sparsejax import analysis
      >>> overlap = np.array([[1.0, 0.3], [0.3, 1.0]])
      >>> ax = analysis.plot_overlap(overlap, [0, 100], ax=Figure().subplots())
      >>> ax.get_xlabel(), ax.get_ylabel()
      ('step', 'step')
    """
    _check_steps("plot_overlap(overlap)", overlap, steps)
    ax = _style.axes(ax)
    picture = ax.pcolormesh(
        steps, steps, overlap, cmap="Blues", vmin=0, vmax=1, shading="nearest"
    )
    bar = ax.figure.colorbar(picture, ax=ax, label="weights in common")
    bar.ax.yaxis.set_major_formatter("{x:.0%}")
    ax.set_aspect("equal")
    ax.set_xlabel("step")
    ax.set_ylabel("step")
    return ax


def _check_steps(what: str, values: np.ndarray, steps: Sequence[int]) -> None:
    if len(values) != len(steps):
        raise ValueError(
            f"{what} must have one row for each of {len(steps)} steps, got "
            f"{len(values)}."
        )
