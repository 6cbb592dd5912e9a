"""Slow reference of SRigL's mask update, from the description of the algorithm.

A layer is a matrix [neurons, fan-in], and everything is done one position at a time.
``index`` numbers its positions in the order in which ties are broken.
"""

import fractions
import math

import numpy as np


def threshold(gamma: float, fan_in: int) -> int:
    """Return tau: max(1, trunc(gamma k)), or gamma itself from 1 on; 0 switches off."""
    exact = fractions.Fraction(str(gamma))
    if exact == 0:
        return 0
    return math.floor(exact) if exact >= 1 else max(1, math.floor(exact * fan_in))


def largest(scores, index, k, eligible) -> np.ndarray:
    """Select the k eligible positions of largest score, of equal ones the first."""
    found = [
        (-scores[i], index[i], i)
        for i in zip(*np.nonzero(eligible), strict=True)
        if not np.isnan(scores[i])
    ]
    chosen = np.zeros(scores.shape, bool)
    for _, _, i in sorted(found)[: max(k, 0)]:
        chosen[i] = True
    return chosen


def _magnitudes(mask, values):
    """Return absolute values in float64; what is undefined at an active weight is 0."""
    values = np.abs(np.asarray(values).astype(np.float64))
    return np.where(mask & np.isnan(values), 0.0, values)


def update(
    mask, weight, gradient, n_drop, budget, tau, *, index=None, revive=True
) -> np.ndarray:
    """Update a mask: the variant that prunes and truncates by magnitude."""
    n, fan_in = mask.shape
    index = np.arange(mask.size).reshape(mask.shape) if index is None else index
    weight, gradient = _magnitudes(mask, weight), _magnitudes(mask, gradient)
    n_prune = min(max(n_drop, 0), int(mask.sum()))
    n_keep = min(int(mask.sum()) - n_prune, int((mask & (weight > 0)).sum()))
    n_prune = int(mask.sum()) - n_keep

    may_live = mask.any(axis=1) | revive
    salient = largest(weight, index, n_keep, mask)
    salient |= largest(
        gradient, index, n_prune, np.repeat(may_live[:, None], fan_in, 1)
    )
    count = salient.sum(axis=1)
    tau = min(tau, sorted(count, reverse=True)[budget // fan_in])
    live = [i for i in range(n) if may_live[i] and count[i] >= tau]
    k = budget // max(len(live), 1)

    of_live = np.isin(np.arange(n), live)[:, None]
    kept = largest(weight, index, n_keep, mask & of_live)
    result = np.zeros_like(mask)
    for i in live:
        row = slice(i, i + 1)
        result[row] = largest(weight[row], index[row], k, kept[row])
        missing = k - int(result[row].sum())
        result[row] |= largest(gradient[row], index[row], missing, ~result[row])
    return result


def official_update(mask, weight, gradient, n_drop, budget, tau) -> np.ndarray:
    """Update a mask as the released code does, in its order and with its flaws.

    It ranks all positions, and inactive weights are zeros there: where live rows run
    out of active ones, pruning keeps zeros, the first by index. A row with too many
    loses the last by index, since the sort that cuts it looks at a mask of bits.
    """
    n, fan_in = mask.shape
    weight = np.where(mask, np.abs(weight.astype(np.float64)), 0.0)
    gradient = np.abs(gradient.astype(np.float64))
    active = int(mask.sum())
    n_keep = min(active - n_drop, int(np.count_nonzero(weight)))
    n_prune = active - n_keep

    def top(scores, k):
        chosen = np.zeros(mask.size, bool)
        chosen[np.argsort(-scores.ravel(), kind="stable")[:k]] = True
        return chosen.reshape(scores.shape)

    count = (top(weight, n_keep) | top(gradient, n_prune)).sum(axis=1)
    tau = min(tau, np.sort(count)[::-1][budget // fan_in])
    ablated = count < tau
    k = budget // int((~ablated).sum())

    lifted = np.where(ablated[:, None], -1.0, weight)
    kept = top(lifted, n_keep)
    result = np.zeros_like(mask)
    for row in np.flatnonzero(~ablated):
        first = np.flatnonzero(kept[row])[:k]
        result[row, first] = True
        steep = np.where(result[row], -1.0, gradient[row])
        grown = np.argsort(-steep, kind="stable")[: k - len(first)]
        result[row, grown] = True
    return result
