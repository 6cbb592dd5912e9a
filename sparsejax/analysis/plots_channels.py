"""Pictures of neurons and channels: what they hold, and which of them go."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsejax.analysis import _style
from sparsejax.analysis.channels import amenable_channels

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_fan_in(
    fan_in: Mapping[str, np.ndarray], *, ax: "Axes | None" = None
) -> "Axes":
    """Draw the fan-in of every neuron, the largest first, a line for each mask.

    Args:
      fan_in: int [neurons] by name, five at most.
      ax: where to draw; new axes by default.

    Returns:
      The axes.

    Example:
      >>> import numpy as np
      >>> from matplotlib.figure import Figure
      >>> from sparsejax import analysis
      >>> fan_in = {"RigL": np.array([2, 0, 1]), "SRigL": np.array([0, 0, 3])}
      >>> ax = analysis.plot_fan_in(fan_in, ax=Figure().subplots())
      >>> [text.get_text() for text in ax.get_legend().get_texts()]
      ['RigL: 2 of 3 live', 'SRigL: 1 of 3 live']
    """
    ax = _style.axes(ax)
    ax.set_prop_cycle(**_style.LINES)
    for name, counts in fan_in.items():
        label = f"{name}: {(counts > 0).sum()} of {counts.size} live"
        values = np.sort(counts, axis=None)[::-1]
        ax.plot(
            np.arange(1, values.size + 1), values, drawstyle="steps-mid", label=label
        )
    ax.set_xlabel("neurons, by fan-in")
    ax.set_ylabel("fan-in")
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def plot_channels(
    scores: np.ndarray, *, below: float = 0.5, ax: "Axes | None" = None
) -> "Axes":
    """Draw the score of every channel, the largest first, and mark the amenable ones.

    Args:
      scores: float [channels] of one group, as from `channel_scores`.
      below: as for `amenable_channels`.
      ax: where to draw; new axes by default.

    Returns:
      The axes.

    Example:
      >>> import numpy as np
      >>> from matplotlib.figure import Figure
      >>> from sparsejax import analysis
      >>> scores = np.array([0.0, 0.1, 1.0, 1.2])
      >>> ax = analysis.plot_channels(scores, ax=Figure().subplots())
      >>> [text.get_text() for text in ax.get_legend().get_texts()]
      ['2 others', '2 amenable, 1 empty']
    """
    ax = _style.axes(ax)
    values = np.sort(scores)[::-1]
    edges = np.arange(values.size + 1)
    amenable = int(amenable_channels(scores, below=below).sum())
    first, empty = values.size - amenable, (values == 0).sum()
    ax.stairs(
        values[:first],
        edges[: first + 1],
        fill=True,
        color=_style.ACTIVE,
        label=f"{first} others",
    )
    ax.stairs(
        values[first:],
        edges[first:],
        fill=True,
        color=_style.DEAD,
        label=f"{amenable} amenable, {empty} empty",
    )
    ax.axhline(below * values.mean(), color="black", linestyle=":", linewidth=1)
    ax.set_xlabel("channels, by score")
    ax.set_ylabel("score")
    ax.legend()
    return ax


def plot_compaction(report: Any, *, ax: "Axes | None" = None) -> "Axes":
    """Draw how many channels each group had, and how many compaction left.

    Args:
      report: what `sparsejax.compaction.compact` returns beside the smaller model;
        groups that cannot shrink are left out.
      ax: where to draw; new axes by default.

    Returns:
      The axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from matplotlib.figure import Figure
      >>> from sparsejax import analysis, compaction
      >>> params = {"a": jnp.ones((3, 4)).at[:, 1].set(0), "b": jnp.ones((4, 2))}
      >>> fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
      >>> _, _, report = compaction.compact_fn(fn, params, jnp.ones((1, 3)))
      >>> ax = analysis.plot_compaction(report, ax=Figure().subplots())
      >>> [text.get_text() for text in ax.texts]
      ['3 of 4']
    """
    ax = _style.axes(ax)
    groups = [group for group in report.groups if np.any(group.removable)]
    names = [group.name for group in groups]
    before = np.array([group.size for group in groups])
    after = before - [report.removed.get(name, 0) for name in names]
    bars = ax.barh(names, before, color=_style.FAINT, label="removed")
    ax.barh(names, after, color=_style.ACTIVE, label="left")
    labels = [f"{a} of {b}" for a, b in zip(after, before, strict=True)]
    ax.bar_label(bars, labels=labels, padding=3)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.4 * before.max(initial=1))  # room for the labels
    ax.set_xlabel("channels")
    ax.legend()
    return ax
