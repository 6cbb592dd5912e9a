"""How much masks of different steps have in common."""

from collections.abc import Mapping

import chex
import numpy as np

from sparsejax.analysis._history import masks_by_path


def mask_overlap(history: Mapping[int, chex.ArrayTree]) -> np.ndarray:
    """Compare the masks of every two recorded steps.

    Args:
      history: masks by step, trees of bool arrays and None, of one network.

    Returns:
      float64 [steps, steps]: of the weights that are active at one of two steps, the
      part that is active at both (the Jaccard index); NaN where none is at either.

    Raises:
      ValueError: there is no step, or the masks belong to different networks.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import analysis
      >>> first = jnp.array([[True, True, False, False]])
      >>> later = jnp.array([[True, False, True, False]])
      >>> analysis.mask_overlap({0: {"w": first}, 100: {"w": later}}).round(2)
      array([[1.  , 0.33], [0.33, 1.  ]])
    """
    both = np.zeros((len(history), len(history)), np.int64)
    for masks in masks_by_path("mask_overlap", history).values():
        bits = np.stack([np.packbits(np.asarray(mask)) for mask in masks])
        both += np.stack([_count(bits & one) for one in bits])
    active = np.diag(both)
    either = active[:, None] + active - both
    return np.divide(both, either, out=np.full(both.shape, np.nan), where=either > 0)


def _count(bits: np.ndarray) -> np.ndarray:
    return np.bitwise_count(bits).sum(axis=1, dtype=np.int64)
