"""What each neuron holds, now and over the steps: its fan-in, births and deaths."""

from collections.abc import Mapping

import chex
import numpy as np

from sparsejax.analysis._history import masks_by_path
from sparsejax.masks.layout import Layout, layouts_of


def fan_in(
    masks: chex.ArrayTree, *, layout: Mapping[str, Layout] | None = None
) -> dict[str, np.ndarray]:
    """Count the active weights of every neuron.

    Args:
      masks: tree of bool arrays, ``True`` where a weight is active, and None where a
        leaf is dense, as `sparsejax.sparse_optax.get_masks` returns it. Vectors, which
        some algorithms mask along with neurons, are left out.
      layout: dict from path regex to `sparsejax.masks.Layout`, which says what the
        neurons are, as in the factories of `sparsejax.sparse_optax`.

    Returns:
      By path int [*batch, neurons], where ``batch`` are stacked layers, if any.

    Raises:
      ValueError: as `sparsejax.masks.select_leaves`, of ``layout``.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import analysis
      >>> kernel = jnp.array([[True, False, True], [True, False, False]])
      >>> analysis.fan_in({"kernel": kernel, "bias": None})
      {'kernel': array([2, 0, 1])}
    """
    found = fan_in_over_time({0: masks}, layout=layout)
    return {path: counts[0] for path, counts in found.items()}


def fan_in_over_time(
    history: Mapping[int, chex.ArrayTree],
    *,
    layout: Mapping[str, Layout] | None = None,
) -> dict[str, np.ndarray]:
    """Count the active weights of every neuron at every step that was recorded.

    Args:
      history: masks by step, each as for `fan_in`, of one network.
      layout: as for `fan_in`.

    Returns:
      By path int [steps, *batch, neurons].

    Raises:
      ValueError: there is no step, the masks belong to different networks, or as
        `fan_in`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import analysis
      >>> kernel = jnp.array([[True, False], [True, False]])
      >>> analysis.fan_in_over_time({0: {"w": kernel}, 100: {"w": ~kernel}})
      {'w': array([[2, 0], [0, 2]])}
    """
    recorded = masks_by_path("fan_in_over_time", history)
    weights = {path: masks for path, masks in recorded.items() if masks[0].ndim > 1}
    layouts = layouts_of({path: masks[0] for path, masks in weights.items()}, layout)
    count = lambda mask, own: np.asarray(own.to_matrix(mask)).sum(axis=-1)
    return {
        path: np.stack([count(mask, layouts[path]) for mask in masks])
        for path, masks in weights.items()
    }


def births_and_deaths(live: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the neurons that begin and that cease to live between recorded steps.

    Args:
      live: bool [steps, neurons], such as whether a fan-in is above 0.

    Returns:
      Births and deaths, int [steps - 1] each: what changed up to the next step.

    Example:
      >>> import numpy as np
      >>> from sparsejax import analysis
      >>> live = np.array([[True, True], [True, False], [False, True]])
      >>> births, deaths = analysis.births_and_deaths(live)
      >>> births.tolist(), deaths.tolist()
      ([0, 1], [1, 1])
    """
    before, after = live[:-1], live[1:]
    return (after & ~before).sum(axis=1), (before & ~after).sum(axis=1)
