"""Slow, sort-based reference loops of sparse training, in float64.

Written from the papers in plain NumPy, apart from the library, on the selections and
schedules of ``oracles``.  Trees are flat dicts from path to array, and their order is
the order of the leaves.
"""

import collections
import dataclasses
import fractions
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import oracles

Arrays = dict[str, np.ndarray]
Masks = dict[str, np.ndarray | None]
Gradient = Callable[[int, Arrays], Arrays]
MaskUpdate = Callable[[int, Masks, Arrays, Arrays], Masks]


# Optimizers: the change of the weights, and the new slots


@dataclasses.dataclass(frozen=True)
class Sgd:
    """Gradient descent with (Nesterov) momentum."""

    learning_rate: float
    momentum: float = 0.0
    nesterov: bool = False
    slot_names = ("trace",)

    def step(self, weight, gradient, slots: Arrays, count: int):
        """Return the change of one weight array and its new slots."""
        del weight, count
        trace = gradient + self.momentum * slots["trace"]
        direction = gradient + self.momentum * trace if self.nesterov else trace
        return -self.learning_rate * direction, {"trace": trace}


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay."""

    learning_rate: float
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-4
    slot_names = ("mu", "nu")

    def step(self, weight, gradient, slots: Arrays, count: int):
        """Return the change of one weight array and its new slots."""
        mu = self.b1 * slots["mu"] + (1 - self.b1) * gradient
        nu = self.b2 * slots["nu"] + (1 - self.b2) * gradient**2
        mean = mu / (1 - self.b1 ** (count + 1))
        scale = np.sqrt(nu / (1 - self.b2 ** (count + 1))) + self.eps
        change = -self.learning_rate * (mean / scale + self.weight_decay * weight)
        return change, {"mu": mu, "nu": nu}


# Training with sparse weights


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Everything that one call leaves behind.

    ``due`` says whether the masks were updated in this call, ``slots`` maps slot name
    and path to an array, ``masks`` is None for a dense leaf, and ``optimizer_steps``
    counts the steps that the inner optimizer has taken.
    """

    due: bool
    masks: Masks
    weights: Arrays
    slots: dict[str, Arrays]
    optimizer_steps: int


def _train(
    weights: Arrays,
    masks: Masks,
    gradient: Gradient,
    optimizer: Sgd | AdamW,
    steps: int,
    *,
    due: Callable[[int], bool],
    new_masks: MaskUpdate,
    step_on_update: bool,
    accumulate: int = 1,
) -> Iterator[Snapshot]:
    """Run the loop that all algorithms share.

    In a due call the masks change first; what was active neither before nor after
    starts from zero, as does every slot that the new masks do not keep.
    """
    weights = {p: np.asarray(w, np.float64) for p, w in weights.items()}
    names = optimizer.slot_names
    slots = {n: {p: np.zeros(w.shape) for p, w in weights.items()} for n in names}
    recent: collections.deque[Arrays] = collections.deque(maxlen=accumulate)
    taken = 0
    for step in range(steps):
        dense = gradient(step, weights)
        dense = {p: np.asarray(dense[p], np.float64) for p in weights}
        recent.append(dense)
        before, is_due = masks, due(step)
        if is_due:
            mean = {p: sum(g[p] for g in recent) / len(recent) for p in weights}
            masks = new_masks(step, masks, weights, mean)
        result: Arrays = {}
        new_slots: dict[str, Arrays] = {name: {} for name in names}
        for path, weight in weights.items():
            active = np.ones(weight.shape, bool)
            survived = active
            if masks[path] is not None:
                active, survived = masks[path], masks[path] & before[path]
            start = np.where(survived, weight, 0.0)
            kept = {name: np.where(survived, slots[name][path], 0.0) for name in names}
            if not is_due or step_on_update:
                seen = np.where(active, dense[path], 0.0)
                change, kept = optimizer.step(start, seen, kept, taken)
                start = np.where(active, start + change, 0.0)
            result[path] = start
            for name in names:
                new_slots[name][path] = kept[name]
        taken += not is_due or step_on_update
        weights, slots = result, new_slots
        yield Snapshot(is_due, masks, weights, slots, taken)


def rigl(
    weights: Arrays,
    masks: Masks,
    gradient: Gradient,
    optimizer: Sgd | AdamW,
    steps: int,
    *,
    drop_fraction: Callable[[int], float | fractions.Fraction],
    grow_scores: Gradient | None = None,
    start_at: int = 0,
    update_every: int = 100,
    stop_at: int | None = None,
    step_on_update: bool = True,
    accumulate: int = 1,
) -> Iterator[Snapshot]:
    """Train with RigL, or with SET where ``grow_scores`` are given.

    ``gradient(step, weights)`` gives the dense gradients.  RigL grows by their mean
    over the last ``accumulate`` calls, the call of the update included; SET by
    ``grow_scores(step, weights)``, which stand for its random draws.

    Run beside a float32 implementation the masks agree only where no two scores lie
    closer than its rounding.  Gradients that are multiples of 1/16 below 8, with SGD
    at learning rate 1/4 and momentum 1/2, stay exact in float32 for ten steps.
    """

    def new_masks(step: int, masks: Masks, weights: Arrays, mean: Arrays) -> Masks:
        scores = mean if grow_scores is None else grow_scores(step, weights)
        result: Masks = {}
        for path, mask in masks.items():
            if mask is None:
                result[path] = None
                continue
            n_drop = math.floor(int(mask.sum()) * drop_fraction(step))
            drop, grow = np.abs(weights[path]), np.abs(scores[path])
            result[path] = oracles.drop_and_grow(mask, drop, grow, n_drop)
        return result

    return _train(
        weights,
        masks,
        gradient,
        optimizer,
        steps,
        due=lambda step: oracles.mask_is_due(step, start_at, update_every, stop_at),
        new_masks=new_masks,
        step_on_update=step_on_update,
        accumulate=accumulate,
    )


def magnitude(
    weights: Arrays,
    budgets: Mapping[str, int | None] | int,
    gradient: Gradient,
    optimizer: Sgd | AdamW,
    steps: int,
    *,
    dense: frozenset[str] = frozenset(),
    start_at: int = 0,
    update_every: int = 100,
    stop_at: int | None = None,
) -> Iterator[Snapshot]:
    """Train with gradual magnitude pruning and yield what each call leaves behind.

    ``budgets`` gives the weights kept at the end: per leaf (None for a leaf that is
    never pruned), or in total over all leaves outside ``dense``.
    """
    events = oracles.pruning_events(start_at, update_every, stop_at)
    per_leaf = isinstance(budgets, Mapping)
    if per_leaf:
        dense = frozenset(path for path, kept in budgets.items() if kept is None)
    sizes = {p: np.size(w) for p, w in weights.items() if p not in dense}

    def keep(size: int, budget: int, step: int) -> int:
        progress = oracles.cubic_progress(step, start_at, events[-1])
        return size - math.floor((size - budget) * progress)

    def new_masks(step: int, masks: Masks, weights: Arrays, mean: Arrays) -> Masks:
        del mean
        scores = {path: np.abs(weights[path]) for path in sizes}
        if per_leaf:
            pruned = {
                path: oracles.prune(
                    masks[path], scores[path], keep(size, budgets[path], step)
                )
                for path, size in sizes.items()
            }
        else:
            total = keep(sum(sizes.values()), budgets, step)
            pruned = oracles.prune_tree(masks, scores, total)
        return {path: pruned.get(path) for path in masks}

    return _train(
        weights,
        {
            p: None if p in dense else np.ones(np.shape(w), bool)
            for p, w in weights.items()
        },
        gradient,
        optimizer,
        steps,
        due=lambda step: step in events,
        new_masks=new_masks,
        step_on_update=True,
    )
