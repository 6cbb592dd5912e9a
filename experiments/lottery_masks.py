"""What a round of iterative magnitude pruning is turned into."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from configs import base
from sparsejax import compaction, lottery
from sparsejax.masks.layout import named_leaves

# Trained again from weights that are drawn anew, instead of the rewound ones.
REINIT = "-reinit"


class Found(NamedTuple):
    """Masks with the structure that they have.

    Attributes:
      masks: tree like the parameters, None where a leaf is dense.
      structured: paths of the layers of which whole channels are kept, or blocks.
      assignments: by path, int32 [out]: the group of each row, as `lottery.Regrouped`
        has it.
    """

    masks: Any
    structured: tuple[str, ...]
    assignments: Mapping[str, np.ndarray]


class Finder:
    """Turns the masks of rounds into those of branches.

    Args:
      config: its `extra` and `groups` are read.
      channels: of the network, as `compaction.channel_groups` returns them.
    """

    def __init__(self, config: base.Lottery, channels: compaction.Report):
        self._config, self._channels = config, channels
        self._refill = jax.jit(functools.partial(lottery.refill_tree, groups=channels))

    def find(self, branch: str, pruned: lottery.Round, params: Any, seed: int) -> Found:
        """Return what a branch makes of a round.

        Args:
          branch: one of `BRANCHES`, with or without `REINIT`.
          pruned: the round.
          params: that it ended with.
          seed: of what is random.
        """
        kind = branch.removesuffix(REINIT)
        if kind == "random":
            return self._shuffled(pruned, seed)
        if kind.startswith("refill"):
            extra = self._config.extra if kind == "refill+" else 0.0
            return self._refilled(pruned, params, extra)
        return self._regrouped(pruned, seed, **_REGROUPED[kind])

    def _shuffled(self, pruned: lottery.Round, seed: int) -> Found:
        """Put as many weights in each layer, at random places."""
        rng = np.random.default_rng([seed, pruned.index])
        shuffle = lambda mask: rng.permutation(mask.ravel()).reshape(mask.shape)
        return Found(jax.tree.map(shuffle, jax.device_get(pruned.masks)), (), {})

    def _refilled(self, pruned: lottery.Round, params: Any, extra: float) -> Found:
        masks = self._refill(pruned.masks, params, extra=extra)
        own, layers = named_leaves(masks), named_leaves(pruned.masks)
        whole = [
            member.path
            for group in self._channels.groups
            # A group that is refilled together has masks on its norms, too.
            if all(m.path in own for m in group.members if m.role == "norm")
            for member in group.members
            if member.role == "producer" and member.path in layers
        ]
        return Found(masks, tuple(whole), {})

    def _regrouped(self, pruned: lottery.Round, seed: int, **options: Any) -> Found:
        masks, groups = jax.device_get(pruned.masks), self._config.groups
        found = lottery.regroup_tree(masks, groups=groups, seed=seed, **options)
        layers = {p: own for p, own in found.layers.items() if not own.fallback}
        assignments = {path: own.assignment for path, own in layers.items()}
        return Found(found.masks, tuple(layers), assignments)


def check_branches(branches: Sequence[str]) -> None:
    """Raise ValueError where there is no such branch."""
    for branch in branches:
        if branch.removesuffix(REINIT) not in BRANCHES:
            raise ValueError(
                f"A branch must be one of {', '.join(BRANCHES)}, with or without "
                f"{REINIT!r} behind it, got {branch!r}."
            )


def _partition(incidence: np.ndarray, groups: int, seed: int) -> np.ndarray:
    """Partition by the cut; what several branches ask for is done once."""
    return _partition_once(incidence.tobytes(), incidence.shape, groups, seed)


@functools.lru_cache(maxsize=128)
def _partition_once(
    incidence: bytes, shape: tuple[int, int], groups: int, seed: int
) -> np.ndarray:
    rows = np.frombuffer(incidence, bool).reshape(shape)
    return lottery.partition_by_cut(rows, groups, seed)


_AT_RANDOM = lottery.partition_at_random
_REGROUPED: dict[str, dict[str, Any]] = {
    "regroup": {"mode": "stale", "partitioner": _partition},
    "regroup-exact": {"mode": "exact", "partitioner": _partition},
    "regroup-count": {"mode": "count", "partitioner": _partition},
    "regroup-random": {"mode": "stale", "partitioner": _AT_RANDOM},
}
# Those with whole channels or blocks, and those of them that are executed and timed:
# blocks of groups at random are as large as others, and "count" finds hardly any.
STRUCTURED = ("refill", "refill+", *_REGROUPED)
TIMED = ("refill", "refill+", "regroup", "regroup-exact")
BRANCHES = (*STRUCTURED, "random")
# Of these an experiment has all, unless it asks for others.
COMPARED = (*BRANCHES, f"refill{REINIT}", f"regroup{REINIT}")
