"""Slow, sort-based reference implementations that the library is checked against.

Written from the papers in plain NumPy and Python, apart from the library: scores are
compared in float64 (exact for float32, bfloat16 and float16 values) and counts are
computed with ``fractions.Fraction``.  Trees are flat dicts from path to array, and
their order is the order of the leaves.
"""

import fractions
import math
from collections.abc import Mapping

import numpy as np

Arrays = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]


# Selection


def _slices(array: np.ndarray, axis) -> np.ndarray:
    """View an array as [slices, elements of the selected axes in row-major order]."""
    if axis is None:
        return array.reshape(1, -1)
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    axes = sorted(a % array.ndim for a in axes)
    rest = [a for a in range(array.ndim) if a not in axes]
    elements = math.prod(array.shape[a] for a in axes)
    return array.transpose(*rest, *axes).reshape(-1, elements)


def _unslice(flat: np.ndarray, shape: tuple[int, ...], axis) -> np.ndarray:
    """Undo ``_slices``."""
    if axis is None:
        return flat.reshape(shape)
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    axes = sorted(a % len(shape) for a in axes)
    order = [a for a in range(len(shape)) if a not in axes] + axes
    return flat.reshape([shape[a] for a in order]).transpose(np.argsort(order))


def _per_slice(k, slices: int) -> list[int]:
    """Give every slice its own count, at least 0."""
    k = np.maximum(np.asarray(k), 0)
    return [int(k)] * slices if k.ndim == 0 else [int(n) for n in k.reshape(slices)]


def _ranking(scores: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """List eligible indices by falling score, equal scores by rising index."""
    candidates = np.flatnonzero(eligible & ~np.isnan(scores))
    return candidates[np.argsort(-scores[candidates], kind="stable")]


def top_k(scores, k, axis=None, where=None) -> np.ndarray:
    """Select the k largest scores (of every slice along ``axis``) by sorting.

    Ties go to the lowest row-major index, a NaN is never chosen, and fewer than k
    are selected where fewer are eligible.
    """
    values = np.asarray(scores).astype(np.float64)
    where = np.ones(values.shape, bool) if where is None else np.asarray(where)
    rows, eligible = _slices(values, axis), _slices(where, axis)
    chosen = np.zeros(rows.shape, bool)
    for index, count in enumerate(_per_slice(k, len(rows))):
        chosen[index, _ranking(rows[index], eligible[index])[:count]] = True
    return _unslice(chosen, values.shape, axis)


def kth_largest(scores, k: int, where=None) -> float:
    """Return the k-th largest eligible score of the whole array, counting from 1."""
    values = np.asarray(scores).astype(np.float64).ravel()
    where = np.ones(values.shape, bool) if where is None else np.ravel(where)
    return float(values[_ranking(values, where)[k - 1]])


def _concatenate(tree: Arrays) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in tree.values()])


def _split(flat: np.ndarray, like: Arrays) -> Arrays:
    """Undo ``_concatenate``."""
    sizes = [np.size(leaf) for leaf in like.values()]
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    pairs = zip(like.items(), parts, strict=True)
    return {path: part.reshape(np.shape(leaf)) for (path, leaf), part in pairs}


def top_k_tree(scores: Arrays, k: int, where: Arrays | None = None) -> Arrays:
    """Select the k largest scores of all leaves together; ties by leaf, then index."""
    eligible = None if where is None else _concatenate({p: where[p] for p in scores})
    return _split(top_k(_concatenate(scores), k, where=eligible), scores)


def drop_and_grow(mask, drop_score, grow_score, n_drop, axis=None) -> np.ndarray:
    """Drop the ``n_drop`` lowest active scores and grow as many of the highest.

    Positions that were just dropped may be grown again.  A NaN grow score is taken
    only where nothing else is left, and then only at a just-dropped position (the
    lowest index first), so that the count never changes.
    """
    mask = np.asarray(mask)
    rows = _slices(mask, axis)
    active = rows.sum(axis=1)
    n_keep = active - np.asarray(_per_slice(n_drop, len(rows)))
    kept = _slices(top_k(drop_score, n_keep, axis, where=mask), axis)
    grow = _slices(np.asarray(grow_score).astype(np.float64), axis)
    result = kept.copy()
    for index, row in enumerate(rows):
        ranking = list(_ranking(grow[index], ~kept[index]))
        last_resort = np.flatnonzero(row & ~kept[index] & np.isnan(grow[index]))
        missing = active[index] - kept[index].sum()
        result[index, (ranking + list(last_resort))[:missing]] = True
    return _unslice(result, mask.shape, axis)


def prune(mask, score, k, axis=None) -> np.ndarray:
    """Keep the k highest active scores; a NaN is pruned first, the last index first."""
    mask = np.asarray(mask)
    rows = _slices(mask, axis)
    scores = _slices(np.asarray(score).astype(np.float64), axis)
    result = np.zeros(rows.shape, bool)
    for index, count in enumerate(_per_slice(k, len(rows))):
        undefined = np.flatnonzero(rows[index] & np.isnan(scores[index]))
        ranking = [*_ranking(scores[index], rows[index]), *undefined]
        result[index, ranking[:count]] = True
    return _unslice(result, mask.shape, axis)


def prune_tree(masks: Arrays, scores: Arrays, k: int) -> Arrays:
    """Keep the k highest active scores of all leaves together."""
    masks = {path: masks[path] for path in scores}
    return _split(prune(_concatenate(masks), _concatenate(scores), k), scores)


# Distributions


def exact(number: float | fractions.Fraction) -> fractions.Fraction:
    """Read a number as it is written: 0.9 is nine tenths."""
    if isinstance(number, fractions.Fraction):
        return number
    return fractions.Fraction(str(number))


def uniform(shapes: Shapes, sparsity: float) -> dict[str, int]:
    """Count the weights kept when every leaf gets floor(S * P) zeros."""
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    return {p: size - math.floor(exact(sparsity) * size) for p, size in sizes.items()}


def erk_densities(
    shapes: Shapes, sparsity: float, power: int = 1
) -> dict[str, fractions.Fraction]:
    """Solve Erdos-Renyi-Kernel: density = min(1, eps * (sum(shape) / size) ** power).

    One leaf at a time, the one with the largest ratio, joins the dense set until no
    density exceeds one.
    """
    ratios = {
        path: fractions.Fraction(sum(shape), math.prod(shape)) ** power
        for path, shape in shapes.items()
    }
    kept = sum(uniform(shapes, sparsity).values())
    dense: set[str] = set()
    while True:
        sparse = [path for path in shapes if path not in dense]
        if not sparse:
            return dict.fromkeys(shapes, fractions.Fraction(1))
        left = kept - sum(math.prod(shapes[path]) for path in dense)
        scale = left / sum(ratios[p] * math.prod(shapes[p]) for p in sparse)
        largest = max(sparse, key=ratios.__getitem__)
        if scale * ratios[largest] <= 1:
            break
        dense.add(largest)
    return {
        path: fractions.Fraction(1) if path in dense else scale * ratios[path]
        for path in shapes
    }


def erk(shapes: Shapes, sparsity: float, power: int = 1) -> dict[str, int]:
    """Count the weights kept when every leaf gets floor((1 - density) * P) zeros."""
    densities = erk_densities(shapes, sparsity, power)
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    return {
        p: size - math.floor((1 - densities[p]) * size) for p, size in sizes.items()
    }


def fan_in_counts(
    shapes: Shapes, densities: Mapping[str, fractions.Fraction]
) -> dict[str, int]:
    """Count the weights per neuron (last axis): trunc(P * density) // neurons."""
    return {
        path: math.floor(math.prod(shape) * densities[path]) // shape[-1]
        for path, shape in shapes.items()
    }


# Schedules: the number of completed calls -> value


def constant_drop(initial: float, step: int) -> fractions.Fraction:
    """Return the drop fraction ``initial`` at every step."""
    del step
    return exact(initial)


def linear_drop(initial: float, stop_at: int, step: int) -> fractions.Fraction:
    """Return a drop fraction that falls in a line to 0 at ``stop_at``."""
    left = fractions.Fraction(max(stop_at - step, 0), stop_at)
    return exact(initial) * left


def cosine_drop(initial: float, stop_at: int, step: int) -> float:
    """Return alpha / 2 * (1 + cos(pi * t / T)), and 0 from T on."""
    return initial / 2 * (1 + math.cos(math.pi * min(step, stop_at) / stop_at))


def mask_is_due(
    step: int, start_at: int, update_every: int, stop_at: int | None
) -> bool:
    """Say whether SET and RigL change their masks in the call numbered ``step``."""
    before_end = stop_at is None or step < stop_at
    return 0 < step and start_at <= step and step % update_every == 0 and before_end


def pruning_events(start_at: int, update_every: int, stop_at: int | None) -> list[int]:
    """List the calls in which gradual magnitude pruning prunes."""
    stop_at = start_at if stop_at is None else stop_at
    events = [t for t in range(start_at, stop_at) if t % update_every == 0]
    return events or [start_at]


def cubic_progress(step: int, first: int, last: int) -> fractions.Fraction:
    """Return 1 - (1 - x) ** 3 for the part x of the way from ``first`` to ``last``."""
    if step >= last:
        return fractions.Fraction(1)
    return 1 - (1 - fractions.Fraction(max(step - first, 0), last - first)) ** 3
