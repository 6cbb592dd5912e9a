"""Slow references of pruning, refill and regroup, from their description alone."""

import fractions
import math

import numpy as np


def columns_by_count(weights):
    """Order columns by how many rows have a weight there, equals by their index."""
    counts = [sum(bool(row[c]) for row in weights) for c in range(weights.shape[1])]
    return sorted(range(weights.shape[1]), key=lambda c: (-counts[c], c))


def exact(weights, ratio):
    """Return the chosen columns, or [] where no K satisfies every row."""
    order = columns_by_count(weights)
    for k in range(1, len(order) + 1):
        rest = order[k:]
        if all(k > ratio * sum(bool(row[c]) for c in rest) for row in weights):
            return sorted(order[:k])
    return []


def stale(weights, ratio):
    """The released loop: rows after the first that fails are not brought up to date."""
    order = columns_by_count(weights)
    left = [int(row.sum()) for row in weights]
    for k in range(1, len(order) + 1):
        failed = False
        for j, row in enumerate(weights):
            left[j] -= int(row[order[k - 1]])
            if k <= ratio * left[j]:
                failed = True
                break
        if not failed:
            return sorted(order[:k])
    return []


def count(weights, least):
    """All columns with at least ``least`` weights."""
    return [c for c in range(weights.shape[1]) if weights[:, c].sum() >= least]


def regrouped(matrix, partition, rule, min_rows, *, repeat):
    """Return the mask [rows, columns] and blocks of a matrix without empty lines.

    With ``repeat`` the rows that have no block yet go through it all again, until that
    leads to no more blocks.
    """
    new, blocks, left = np.zeros_like(matrix), {}, list(range(len(matrix)))
    while True:
        used = [c for c in range(matrix.shape[1]) if any(matrix[i, c] for i in left)]
        parts = partition(matrix[np.ix_(left, used)]) if left else []
        fresh = {}
        for part in sorted(set(parts)):
            rows = [i for i, own in zip(left, parts, strict=True) if own == part]
            if len(rows) < min_rows:
                continue
            columns = [used[c] for c in rule(matrix[np.ix_(rows, used)])]
            for i in rows:
                for c in columns:
                    new[i, c] = True
            if columns:
                fresh[tuple(rows)] = tuple(columns)
        blocks |= fresh
        left = [i for i in left if not any(i in rows for rows in fresh)]
        if not repeat or not fresh:
            return new, blocks


def pruned(flat_mask, flat_weights, rate):
    """Remove round(rate * active) weights, halves up, of equals the last go first."""
    active = [i for i, own in enumerate(flat_mask) if own]
    gone = math.floor(
        fractions.Fraction(str(rate)) * len(active) + fractions.Fraction(1, 2)
    )
    by_worth = sorted(active, key=lambda i: (-abs(flat_weights[i]), i))
    new = np.zeros(len(flat_mask), bool)
    new[by_worth[: len(active) - gone]] = True
    return new


def neurons_kept(active, fan_in, neurons, extra):
    """Return how many neurons refill keeps."""
    filled = fractions.Fraction(active, fan_in)
    more = filled + (neurons - filled) * fractions.Fraction(str(extra))
    return max(math.ceil(filled), math.floor(more))


def refilled(rows, scores, extra):
    """Return the rows [neurons] that refill keeps of a mask [neurons, fan_in]."""
    k = neurons_kept(int(rows.sum()), rows.shape[1], len(rows), extra)
    best = sorted(range(len(rows)), key=lambda i: (-scores[i], i))[:k]
    return np.isin(np.arange(len(rows)), best)
