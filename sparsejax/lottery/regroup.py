"""Regroup: the dense blocks that are hidden in an unstructured mask.

Rows with columns in common are put together, and of each group of rows the columns that
most of them use are filled up. All else goes. This is host code in NumPy: it runs once,
between two trainings.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from sparsejax._trees import tree_at
from sparsejax.lottery import _columns
from sparsejax.lottery._partition import Partitioner, partition_by_cut
from sparsejax.masks.layout import Layout, layouts_of, named_leaves

Mode = Literal["stale", "exact", "count"]
MODES = ("stale", "exact", "count")

Block = tuple[np.ndarray, np.ndarray]


class Regrouped(NamedTuple):
    """A mask made of blocks, and how it came about; see `regroup`."""

    mask: np.ndarray  # bool, like the mask that was given
    blocks: tuple[Block, ...]  # rows and columns, ascending, int32
    fallback: bool  # whether there are no blocks, and the mask is the one given
    reason: str  # why there are none; empty where there are
    assignment: np.ndarray  # int32 [out], the last group of each row; -1: of none
    seed: int  # that the partitioner was given


class RegroupedTree(NamedTuple):
    """What `regroup` made of each mask of a tree."""

    masks: Any  # tree like the one given
    layers: Mapping[str, Regrouped]  # by path

    @property
    def structured_fraction(self) -> float:
        """The weights in layers that are made of blocks, of those in all layers."""
        layers = self.layers.values()
        structured = sum(layer.mask.size for layer in layers if not layer.fallback)
        return structured / sum(layer.mask.size for layer in layers)


def regroup(
    mask: np.ndarray | jax.Array,
    *,
    groups: int = 8,
    mode: Mode = "exact",
    ratio: float = 1.5,
    column_density: float = 0.5,
    min_rows: int | None = None,
    min_columns: int = 1,
    partitioner: Partitioner = partition_by_cut,
    seed: int = 0,
    layout: Layout | None = None,
) -> Regrouped:
    """Turn an unstructured mask into dense blocks.

    The mask is seen as a matrix ``[out, n]``: a row for each neuron and a column for
    each of its inputs, in the order of the array. The columns of a convolution kernel
    ``[kh, kw, in, out]`` are therefore those of ``kernel.reshape(-1, out).T``, column
    ``(r * kw + s) * in + c`` for the tap (r, s) and the input channel c. (The authors
    have ``(c * kh + r) * kw + s``.)

    Rows that are not empty are partitioned into groups. Of each group of enough rows,
    the columns in which most of its rows have a weight are taken, K of them:

    - "exact": the least K such that for every row ``K > ratio * L``, L being the number
      of its weights in other columns. A perfectly dense block loses two fifths of its
      columns, and small blocks come out of unstructured masks.
    - "stale": the same condition as the released code tests it, column by column: its
      loop over the rows stops at the first that fails, so that the L of later rows
      still have weights in columns that were taken meanwhile. K is about
      ``ratio * max(weights of a row)``, there is none where rows are dense, and the
      densities of the paper come out.
    - "count": all columns with a weight in ``column_density`` of the rows, as the
      paper's algorithm is printed. As in it, rows that come into no block are
      partitioned again, for as long as that finds blocks; in the other modes, as in the
      released code, they are not. Groups of each partition are numbered on.

    Rows and columns make a block. All of it becomes active, and everything outside of
    blocks inactive, rows of groups without a block included. Where there is no block
    at all, ``fallback`` is True and the mask stays as it is.

    Args:
      mask: bool array of two or more dimensions, ``True`` where a weight is active.
      groups: how many groups of rows, at least 2.
      mode: how the columns of a group are chosen.
      ratio: see above; for "exact" and "stale".
      column_density: see above, in (0, 1]; for "count".
      min_rows: of a block; by default 17, as in the released code, and for "count" 16,
        as in the paper.
      min_columns: of a block; for "count".
      partitioner: ``(incidence, groups, seed) -> assignment``, with the incidence bool
        [rows, columns], of the rows and columns that are not empty, and the assignment
        int [rows], the group of each, from 0 to ``groups - 1``. By default
        `partition_by_cut`, which needs mtkahypar; `partition_at_random` is a control.
      seed: of the partitioner.
      layout: which axes are outputs, by default the last; all others are inputs, in
        their order.

    Returns:
      A `Regrouped`. Blocks share no row, and the largest group comes first. The
      released code cuts blocks at multiples of 32 rows for its kernel; here a group is
      one block, of the same mask.

    Raises:
      ValueError, TypeError: arguments that cannot be meant, a layout that stacks
        layers, or an assignment that is none.
      ImportError: the default partitioner is not installed.

    References:
      Chen et al. 2022, "Coarsening the granularity: towards structurally sparse lottery
      tickets", section 3.3 and algorithm 3, and its released code.

    Example:
      >>> import numpy as np
      >>> from sparsejax import lottery
      >>> mask = np.kron(np.eye(2, dtype=bool), np.ones((10, 20), bool))  # [in, out]
      >>> halves = lambda incidence, groups, seed: np.repeat([0, 1], 20)
      >>> found = lottery.regroup(mask, groups=2, partitioner=halves)
      >>> [(rows.tolist()[:3], columns.tolist()) for rows, columns in found.blocks]
      [([0, 1, 2], [0, 1, 2, 3, 4, 5, 6]), ([20, 21, 22], [10, 11, 12, 13, 14, 15, 16])]
      >>> int(found.mask.sum()), found.fallback
      (280, False)
    """
    if min_rows is None:
        min_rows = 16 if mode == "count" else 17
    _check(mask, groups, mode, ratio, column_density)
    _check_least(min_rows=min_rows, min_columns=min_columns)
    given = np.asarray(mask)
    own = (layout or Layout()).resolve(given.ndim)
    if own.batch:
        raise ValueError(
            f"regroup(layout=...): a mask of one layer is needed, got {layout}, which "
            "stacks layers; regroup each by itself."
        )
    matrix = _to_rows(given, own)
    assignment = np.full(len(matrix), -1, np.int32)
    choose = {
        "exact": lambda weights: _columns.exact(weights, ratio),
        "stale": lambda weights: _columns.stale(weights, ratio),
        "count": lambda weights: _columns.count(weights, column_density, min_columns),
    }[mode]

    def fall_back(reason: str) -> Regrouped:
        return Regrouped(given.copy(), (), True, reason, assignment, seed)

    rows = np.flatnonzero(matrix.any(1))
    if math.prod(given.shape[i] for i in own.inputs) == 1:
        return fall_back("it has one input channel, as depthwise kernels have")
    if len(rows) < min_rows:
        return fall_back(f"{len(rows)} rows are not empty; a block needs {min_rows}")

    blocks: list[Block] = []
    filled, first = np.zeros_like(matrix), 0
    while len(rows) >= min_rows:
        columns = np.flatnonzero(matrix[rows].any(0))
        incidence = matrix[np.ix_(rows, columns)]
        parts = _checked_parts(partitioner(incidence, groups, seed), len(rows), groups)
        assignment[rows] = first + parts
        found = [
            (rows[in_rows].astype(np.int32), columns[in_columns].astype(np.int32))
            for in_rows, in_columns in _in_groups(incidence, parts, choose, min_rows)
        ]
        for block in found:
            filled[np.ix_(*block)] = True
        blocks += found
        if mode != "count" or not found:
            break
        rows, first = rows[~filled[rows].any(1)], first + groups
    if not blocks:
        most = np.bincount(assignment[assignment >= 0]).max()
        if most < min_rows:
            return fall_back(
                f"the largest group has {most} rows; a block needs {min_rows}"
            )
        return fall_back(f"no group of rows has enough columns in common ({mode})")
    new = _from_rows(filled, given.shape, own)
    return Regrouped(new, tuple(blocks), False, "", assignment, seed)


def regroup_tree(
    masks: Any, *, layout: Mapping[str, Layout] | None = None, **options: Any
) -> RegroupedTree:
    """Turn each mask of a tree into dense blocks.

    Args:
      masks: tree of bool arrays, and None where a leaf is dense. Vectors stay as they
        are, and are no layers.
      layout: dict from path regex to `sparsejax.masks.Layout`.
      **options: those of `regroup`, but for the layout; one seed for all.

    Returns:
      A `RegroupedTree`: the masks, of layers with a fallback too, what `regroup`
      returned of each layer by path, and which fraction of the weights is in blocks'
      layers.

    Raises:
      ValueError, TypeError, ImportError: as `regroup`, or there is no mask.

    Example:
      >>> import numpy as np
      >>> from sparsejax import lottery
      >>> mask = np.kron(np.eye(2, dtype=bool), np.ones((10, 20), bool))
      >>> masks = {"a": mask, "b": np.ones((4, 12), bool), "bias": None}
      >>> halves = lambda incidence, groups, seed: np.repeat([0, 1], 20)
      >>> found = lottery.regroup_tree(masks, groups=2, partitioner=halves)
      >>> {path: layer.reason for path, layer in found.layers.items()}
      {'a': '', 'b': '12 rows are not empty; a block needs 17'}
      >>> round(found.structured_fraction, 3)
      0.943
    """
    named, layouts = named_leaves(masks), layouts_of(masks, layout)
    layers = {}
    for path, mask in named.items():
        if np.ndim(mask) < 2:
            continue
        try:
            layers[path] = regroup(mask, layout=layouts[path], **options)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from error
    if not layers:
        raise ValueError(
            "regroup_tree(masks): a mask of two or more dimensions is needed, got "
            f"{', '.join(named) or 'no mask'}."
        )
    new = {**named, **{path: layer.mask for path, layer in layers.items()}}
    marked = jax.tree.map(lambda _: 0, masks, is_leaf=lambda x: x is None)
    return RegroupedTree(tree_at(marked, new), layers)


def _in_groups(
    incidence: np.ndarray,
    parts: np.ndarray,
    choose: Callable[[np.ndarray], int],
    min_rows: int,
) -> list[Block]:
    """Return the blocks in groups of rows, of the largest group first.

    Args:
      incidence: bool [rows, columns].
      parts: int [rows], the group of each.
      choose: how many columns a block takes, of bool [rows of a group, columns], in
        which the columns with most weights come first.
      min_rows: of a block.
    """
    clusters = [np.flatnonzero(parts == group) for group in np.unique(parts)]
    blocks = []
    for cluster in sorted(clusters, key=lambda cluster: (-len(cluster), cluster[0])):
        weights = incidence[cluster]
        order = np.argsort(-weights.sum(0), kind="stable")
        if len(cluster) >= min_rows and (k := choose(weights[:, order])):
            blocks.append((cluster, np.sort(order[:k])))
    return blocks


def _to_rows(array: np.ndarray, own: Layout) -> np.ndarray:
    """Return [out, n], the inputs in the order of the array."""
    rest = [i for i in range(array.ndim) if i not in own.outputs]
    outputs = math.prod(array.shape[i] for i in own.outputs)
    return array.transpose([*own.outputs, *rest]).reshape(outputs, -1)


def _from_rows(matrix: np.ndarray, shape: Sequence[int], own: Layout) -> np.ndarray:
    """Invert `_to_rows`."""
    order = [*own.outputs, *(i for i in range(len(shape)) if i not in own.outputs)]
    unfolded = matrix.reshape([shape[i] for i in order])
    return np.ascontiguousarray(unfolded.transpose(np.argsort(order)))


def _check(mask: Any, groups: Any, mode: Any, ratio: Any, column_density: Any) -> None:
    dtype = getattr(mask, "dtype", None)
    if dtype != np.bool_ or mask.ndim < 2:
        got = f"{dtype}{list(mask.shape)}" if dtype is not None else repr(mask)
        raise TypeError(
            "regroup(mask) must be a bool array of two or more dimensions, True where "
            f"a weight is active, got {got}."
        )
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 2:
        raise ValueError(
            f"regroup(groups=...) must be an integer of at least 2, got {groups!r}."
        )
    if mode not in MODES:
        raise ValueError(f"regroup(mode=...) must be one of {MODES}, got {mode!r}.")
    if not ratio > 0:
        raise ValueError(f"regroup(ratio=...) must be positive, got {ratio!r}.")
    if not 0 < column_density <= 1:
        raise ValueError(
            f"regroup(column_density=...) must lie in (0, 1], got {column_density!r}."
        )


def _check_least(**given: Any) -> None:
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"regroup({name}=...) must be an integer of at least 1, got {value!r}."
            )


def _checked_parts(parts: Any, rows: int, groups: int) -> np.ndarray:
    parts = np.asarray(parts)
    whole = np.issubdtype(parts.dtype, np.integer) and parts.shape == (rows,)
    if not whole or parts.min() < 0 or parts.max() >= groups:
        raise ValueError(
            f"regroup(partitioner=...) must return an integer from 0 to {groups - 1} "
            f"for each of the {rows} rows, got {parts!r}."
        )
    return parts
