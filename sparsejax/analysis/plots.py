"""Pictures of masks, drawn on Matplotlib axes."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from sparsejax.analysis import _style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_mask(mask: jax.Array | np.ndarray, *, ax: "Axes | None" = None) -> "Axes":
    """Draw a mask, one column a neuron and one row an input.

    Active weights are dark. The last axis is taken for the neurons; all others, such
    as a convolution's window and input channels, lie one behind the other in a row's
    place.

    Args:
      mask: bool [..., neurons].
      ax: where to draw; new axes by default.

    Returns:
      The axes.
    """
    ax = _style.axes(ax)
    mask = np.asarray(mask)
    rows = mask.reshape(-1, mask.shape[-1])
    ax.imshow(rows, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="none")
    ax.set_xlabel("neuron")
    ax.set_ylabel("input")
    return ax


def plot_input_connections(
    mask: jax.Array | np.ndarray,
    image_shape: Sequence[int],
    *,
    vmax: int | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw how many weights the first layer has at every pixel.

    Args:
      mask: bool [height * width * channels, neurons], of a layer that sees flattened
        images.
      image_shape: height, width, channels.
      vmax: the number that gets the darkest colour; by default the largest there is.
      ax: where to draw; new axes by default.

    Returns:
      The axes.

    Raises:
      ValueError: where `mask` has not one row for each value of an image.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.shape[0] != math.prod(image_shape):
        raise ValueError(
            f"plot_input_connections needs a mask of {math.prod(image_shape)} rows, "
            f"one for each value of an image {tuple(image_shape)}, got {mask.shape}."
        )
    ax = _style.axes(ax)
    connections = mask.sum(axis=1).reshape(image_shape).sum(axis=-1)
    picture = ax.imshow(connections, cmap="Blues", vmin=0, vmax=vmax)
    ax.figure.colorbar(picture, ax=ax, label="weights at the pixel")
    return ax


def plot_densities(
    densities: Mapping[str, float], *, ax: "Axes | None" = None
) -> "Axes":
    """Draw one bar a layer: the part of its weights that is active.

    Args:
      densities: density in [0, 1] by parameter path, drawn from the top downwards.
      ax: where to draw; new axes by default.

    Returns:
      The axes.
    """
    ax = _style.axes(ax)
    names, values = list(densities), list(densities.values())
    bars = ax.barh(names, values, color=_style.ACTIVE)
    ax.bar_label(bars, labels=[f"{value:.1%}" for value in values], padding=3)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.3 * max(values, default=1.0))  # room for the labels
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.set_xlabel("density")
    return ax
