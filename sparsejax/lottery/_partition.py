"""Rows put into groups: those that have columns in common, or at random.

A partitioner is a function ``(incidence, groups, seed) -> assignment``. The incidence
is bool [rows, columns], a hypergraph whose vertices are the rows and whose hyperedges
are the columns; the assignment is int [rows], the group of each row, from 0.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

Partitioner = Callable[[np.ndarray, int, int], np.ndarray]


def partition_by_cut(
    incidence: np.ndarray, groups: int, seed: int, *, imbalance: float = 0.03
) -> np.ndarray:
    """Partition rows so that columns are spread over as few groups as possible.

    The number of groups that have a nonzero of a column, less one, is summed over
    columns and minimised. The paper's partitioner bisects, and minimises the number of
    columns that are cut; where nearly every column has a nonzero in every group, as in
    masks that are not very sparse, that number tells partitions no longer apart.

    The same arguments give the same partition, on any number of threads.

    Args:
      incidence: bool [rows, columns].
      groups: how many groups, at least 2.
      seed: of the partitioner, an integer.
      imbalance: how much larger than the mean a group may be, as a fraction of it. The
        larger it is, the smaller is the smallest group, and rows of a group that is too
        small for a block are lost. The paper's bisections, of 40 to 60 % each, allow
        0.728 for 8 groups; pass another by `functools.partial`.

    Returns:
      int32 [rows].

    Raises:
      ImportError: mtkahypar is not installed.

    References:
      Gottesbüren et al. 2024, "Scalable high-quality hypergraph partitioning", for
      Mt-KaHyPar, in its deterministic configuration.
    """
    mtkahypar, library = _initialized()
    context = library.context_from_preset(mtkahypar.PresetType.DETERMINISTIC)
    context.set_partitioning_parameters(groups, imbalance, mtkahypar.Objective.KM1)
    context.logging = False
    mtkahypar.set_seed(seed)
    edges = [np.flatnonzero(column).tolist() for column in np.asarray(incidence).T]
    edges = [edge for edge in edges if len(edge) > 1]  # others are never cut
    hypergraph = library.create_hypergraph(context, len(incidence), len(edges), edges)
    return np.array(hypergraph.partition(context).get_partition(), np.int32)


def partition_at_random(incidence: np.ndarray, groups: int, seed: int) -> np.ndarray:
    """Partition rows at random into groups whose sizes differ by one at most.

    The control of `partition_by_cut`, with the same arguments.

    Example:
      >>> import numpy as np
      >>> from sparsejax import lottery
      >>> parts = lottery.partition_at_random(np.ones((7, 3), bool), 2, seed=0)
      >>> np.bincount(parts).tolist()
      [4, 3]
    """
    shuffled = np.random.default_rng(seed).permutation(len(incidence))
    return (shuffled % groups).astype(np.int32)


@functools.cache
def _initialized() -> tuple[Any, Any]:
    """Return the library and its threads, which it starts once in a process."""
    try:
        import mtkahypar  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "lottery.partition_by_cut, the default of regroup(partitioner=...), needs "
            "mtkahypar, which is not installed: pip install 'sparsejax[regroup]', or "
            "pass another partitioner, such as lottery.partition_at_random."
        ) from error
    return mtkahypar, mtkahypar.initialize(os.cpu_count() or 1, False)
