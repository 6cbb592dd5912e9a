"""The axes and the colours of all pictures.

Matplotlib is imported where a function needs axes of its own, so that the package
works without it.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# They differ in lightness, and to the colour-blind.
ACTIVE = "#20508a"
DEAD = "#d55e00"
FAINT = "#c6d6ea"

# From dark to light, so that lines differ in grey too.
LINES = {
    "color": ["#000000", ACTIVE, DEAD, "#7b2d8e", "#9aa62b"],
    "linestyle": ["--", "-", "-", "-.", ":"],
}


def axes(ax: "Axes | None") -> "Axes":
    """Return the axes, or new ones for None."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots()[1]


def shades(n: int) -> np.ndarray:
    """Return ``n`` blues from dark to light."""
    from matplotlib import colormaps

    return colormaps["Blues"](np.linspace(0.9, 0.3, n))
