"""How many columns of a group of rows make a block.

Weights are bool [rows, columns], with the columns that have most weights first.
"""

import numpy as np


def exact(weights: np.ndarray, ratio: float) -> int:
    """Return the least K with ``K > ratio * L`` for every row of [rows, columns]."""
    left = weights.sum(1, keepdims=True) - np.cumsum(weights, axis=1)
    k = np.arange(1, weights.shape[1] + 1)
    enough = k > ratio * left.max(0)
    return int(k[np.argmax(enough)]) if enough.any() else 0


def stale(weights: np.ndarray, ratio: float) -> int:
    """Return K as the released code finds it: rows after one that fails wait."""
    left = weights.sum(1)
    for k, column in enumerate(weights.T, start=1):
        now = left - column
        fails = k <= ratio * now
        if not fails.any():
            return k
        seen = np.argmax(fails) + 1
        left[:seen] = now[:seen]
    return 0


def count(weights: np.ndarray, density: float, min_columns: int) -> int:
    """Return how many columns have a weight in enough rows."""
    k = int((weights.sum(0) >= density * len(weights)).sum())
    return k if k >= min_columns else 0
