"""Chase in plain NumPy and Python, written from the paper apart from the library.

Channels are numbered within their groups; a group is anything with ``size`` and
``members`` of ``path``, ``axis``, ``role`` and ``channels``.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import oracles
import simulators

# Removal


def remove(scores, live, keep: int, floors) -> list[np.ndarray]:
    """Remove by iterated thresholds, as the released code does.

    Cut the lowest channels of all groups that are not frozen. A group that would fall
    below its floor loses its lowest channels down to the floor and is frozen; then cut
    anew for what is still to go, until no group falls below.
    """
    live = [np.array(one) for one in live]
    to_go = max(0, sum(int(one.sum()) for one in live) - keep)
    open_ = set(range(len(live)))
    while to_go and open_:
        ranking = sorted(
            (scores[group][channel], group, channel)
            for group in open_
            for channel in np.flatnonzero(live[group])
        )
        cut = {
            group: [channel for _, g, channel in ranking[:to_go] if g == group]
            for group in open_
        }
        room = {group: max(0, int(live[group].sum()) - floors[group]) for group in cut}
        full = [group for group in cut if len(cut[group]) > room[group]]
        for group in full or list(cut):
            gone = cut[group][: room[group]]
            live[group][gone] = False
            to_go -= len(gone)
            open_.discard(group)
    return live


def score(group, weights, masks, criterion: str, spatial: dict[str, int]) -> np.ndarray:
    """Score channel by channel; ``spatial`` counts the leading spatial axes."""
    per_layer = []
    for member in group.members:
        if member.role != "producer":
            continue
        mask = np.moveaxis(np.asarray(masks[member.path]), member.axis, -1)
        weight = np.abs(np.asarray(weights[member.path], np.float64))
        weight = np.where(mask, np.moveaxis(weight, member.axis, -1), 0)
        axes = tuple(range(spatial[member.path]))
        found = []
        for channel in range(group.size):
            own = member.channels == channel
            active, magnitude = mask[..., own], weight[..., own]
            kernels = active.any(axis=axes)
            found.append(
                {
                    "umm": magnitude.sum() / magnitude.size,
                    "wmm": magnitude.sum() / max(1, active.sum()),
                    "channel_density": active.sum() / active.size,
                    "kernel_density": kernels.sum() / kernels.size,
                }[criterion]
            )
        per_layer.append(found)
    return np.mean(per_layer, axis=0)


# Exploration


def explore(masks, weights, gradients, keep: int, total: int) -> dict[str, np.ndarray]:
    """Keep the largest active weights of all leaves, then grow by the gradient."""
    paths = list(masks)
    join = lambda tree: np.concatenate([np.ravel(tree[path]) for path in paths])
    mask, weight, gradient = join(masks), np.abs(join(weights)), np.abs(join(gradients))
    kept = oracles.top_k(np.nan_to_num(weight), keep, where=mask)
    growable = ~kept & (gradient > 0)
    new = kept | oracles.top_k(gradient, total - kept.sum(), where=growable)
    ends = np.cumsum([np.size(masks[path]) for path in paths])[:-1]
    parts = zip(paths, np.split(new, ends), strict=True)
    return {path: part.reshape(np.shape(masks[path])) for path, part in parts}


# Schedules


def half_cosine(initial: float, final: float, stop_at: int, step: int) -> float:
    """Return a value that falls from ``initial`` to ``final`` at ``stop_at``."""
    angle = math.pi * min(step, stop_at) / stop_at
    return final + (initial - final) * (1 + math.cos(angle)) / 2


def channels_kept(channels: int, sparsity: float, stop_at: int, step: int) -> int:
    """Return floor(B (1 - s(t))), with s(t) = S (1 - (1 - t / T)^3)."""
    gone = oracles.exact(sparsity) * oracles.cubic_progress(step, 0, stop_at)
    return math.floor(channels * (1 - gone))


def removals(update_every: int, remove_every: int, stop_removal_at: int) -> list[int]:
    """List the steps at which channels go, half an exploration off the multiples."""
    steps = range(stop_removal_at)
    return [t for t in steps if (t + update_every // 2) % remove_every == 0]


# Training


def chase(
    weights,
    masks,
    groups: Sequence,
    gradient: Callable,
    optimizer,
    steps: int,
    *,
    sparse: Sequence[str],
    channel_sparsity: float,
    min_channels: float,
    soft_extra: float,
    drop_fraction: float,
    update_every: int,
    stop_soft_at: int,
    stop_at: int,
    remove_every: int,
    stop_removal_at: int,
) -> Iterator[tuple[simulators.Snapshot, list[np.ndarray]]]:
    """Train with Chase, globally, by UMM; yield what each call leaves, and who lives.

    ``masks`` hold all leaves: ``sparse`` ones, those that lose channels alone, and
    None for all others.
    """
    live = [np.ones(group.size, bool) for group in groups]
    budget = sum(int(masks[path].sum()) for path in sparse)
    size = sum(masks[path].size for path in sparse)
    channels = sum(group.size for group in groups)
    left = 1 - oracles.exact(channel_sparsity)
    floors = [math.floor(g.size * left * oracles.exact(min_channels)) for g in groups]
    removes = removals(update_every, remove_every, stop_removal_at)
    explores = [t for t in range(update_every, stop_at) if t % update_every == 0]
    spatial = {path: np.ndim(weights[path]) - 2 for path in sparse}

    def new_masks(step, masks, weights, mean):
        if step in removes:
            end = stop_removal_at if step == removes[-1] else step
            scores = [score(g, weights, masks, "umm", spatial) for g in groups]
            keep = channels_kept(channels, channel_sparsity, stop_removal_at, end)
            live[:] = remove(scores, live, keep, floors)
        alive = {p: np.ones(m.shape, bool) for p, m in masks.items() if m is not None}
        for group, own in zip(groups, live, strict=True):
            for member in group.members:
                if member.role == "statistic":
                    continue
                for index, channel in enumerate(member.channels):
                    if channel >= 0 and not own[channel]:
                        at = (slice(None),) * member.axis + (index,)
                        alive[member.path][at] = False
        masks = {p: m if m is None else m & alive[p] for p, m in masks.items()}
        if step not in explores:
            return masks
        active = sum(int(masks[path].sum()) for path in sparse)
        if step < stop_soft_at:
            extra = half_cosine(soft_extra, 0.0, stop_soft_at, step)
            keep, total = budget, budget + math.floor(size * extra)
        else:
            rate = half_cosine(drop_fraction, drop_fraction / 100, stop_at, step)
            keep, total = min(budget, active - math.ceil(rate * active)), budget
        seen = {path: np.where(alive[path], mean[path], 0) for path in sparse}
        of = lambda tree: {path: tree[path] for path in sparse}
        return masks | explore(of(masks), of(weights), seen, keep, total)

    run = simulators._train(
        weights,
        masks,
        gradient,
        optimizer,
        steps,
        due=lambda step: step in removes or step in explores,
        new_masks=new_masks,
        step_on_update=True,
    )
    for snapshot in run:
        yield snapshot, [own.copy() for own in live]
