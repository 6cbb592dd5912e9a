"""Masks of a network whose leaves have patterns, or none: first ones and updates.

A leaf without a pattern is one of blocks of a single weight. All leaves of blocks go
through one search, whatever their blocks are; groups of N:M are ranked by themselves.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.masks import unstructured
from sparsejax.masks._random import random_masks, random_scores, random_words
from sparsejax.masks._search import keys_of
from sparsejax.masks._tiles import Tiles, cut
from sparsejax.masks.layout import Layout, Leaf, first_match
from sparsejax.masks.patterns import NM, Block, Pattern

Patterns = (
    Pattern
    | Mapping[str, Pattern | None]
    | Callable[[str, tuple[int, ...]], Pattern | None]
    | None
)


class Patterned(NamedTuple):
    """A leaf and its pattern."""

    path: str
    layout: Layout
    pattern: Pattern
    tiles: Tiles
    size: int  # weights in a layer

    def pool(self, x: jax.Array) -> jax.Array:
        """Return what ranks the units of the pattern by magnitude.

        For blocks the sums of magnitudes; for N:M, and blocks of one, ``x`` itself.
        """
        if isinstance(self.pattern, NM) or not self.tiles.axes:
            return x
        return self.tiles.total(jnp.abs(x))

    def counts(self, budget: Any) -> tuple[int, Any]:
        """Return the units in a slice of the selection, and how many it keeps.

        A slice is a group of N:M, or a layer of blocks.
        """
        return self.pattern.counts(self.size, budget)

    def budget(self, given: int) -> int:
        """Return how many weights a layer keeps that is given so many."""
        return self.pattern.budget(self.size, given)

    @property
    def layer_axes(self) -> tuple[int, ...] | None:
        """The axes of one layer; None where nothing is stacked."""
        return self.layout.layer_axes(len(self.tiles.shape))


def patterned_leaves(leaves: Sequence[Leaf], pattern: Patterns) -> list[Patterned]:
    """Find the pattern of each leaf.

    Args:
      leaves: the sparse leaves.
      pattern: one for all of them, a dict from regex to pattern of which the first
        that is found in a path counts, or a function ``(path, shape) -> pattern``.
        None, for all or for some: weights are active by themselves.

    Raises:
      ValueError: a regex matches nothing, or tiles do not divide a leaf.
      TypeError: a function returns something else.
    """
    shapes = {leaf.path: leaf.shape for leaf in leaves}
    if isinstance(pattern, Mapping):
        chosen = first_match("pattern", dict(pattern), shapes)
    elif callable(pattern):
        chosen = {path: pattern(path, shape) for path, shape in shapes.items()}
    else:
        chosen = dict.fromkeys(shapes, pattern)
    return [_patterned(leaf, chosen.get(leaf.path)) for leaf in leaves]


def _patterned(leaf: Leaf, pattern: Pattern | None) -> Patterned:
    pattern = Block(1, 1) if pattern is None else pattern
    if not isinstance(pattern, Pattern):
        raise TypeError(
            f"pattern= for {leaf.path} must be a sparsejax.masks.NM, a "
            f"sparsejax.masks.Block or None, got {pattern!r}."
        )
    try:
        tiles = cut(str(pattern), leaf.shape, leaf.layout, pattern.tile)
    except ValueError as error:
        raise ValueError(
            f"pattern= for {leaf.path}: {error} Give this leaf another pattern, or "
            "None, by a dict from regex to pattern or a function of path and shape, or "
            "leave it dense with where=."
        ) from None
    size = math.prod(leaf.layout.layer_shape(leaf.shape))
    return Patterned(leaf.path, leaf.layout, pattern, tiles, size)


def draw_all(
    key: jax.Array,
    leaves: Sequence[Patterned],
    weights: Sequence[jax.Array],
    budgets: Sequence[Any],
) -> list[jax.Array]:
    """Draw masks, each uniform among those of its pattern that keep the budget.

    Args:
      key: a PRNG key.
      leaves: whose masks they are; each draws from the key by its path alone.
      weights: arrays whose shapes and shardings the masks take.
      budgets: for each how many weights are active, scalar or per stacked layer.

    Returns:
      List of bool arrays.
    """

    def blocks(leaves, weights, budgets):
        named = {x.path: x.pool(w) for x, w in _zip(leaves, weights)}
        kept = [x.counts(budget)[1] for x, budget in _zip(leaves, budgets)]
        chosen = random_masks(key, named, kept, [x.layer_axes for x in leaves])
        return _spread(leaves, chosen, weights)

    def groups(leaves, weights, budgets):
        words = random_words(key, [x.path for x in leaves])
        return [
            x.tiles.largest(
                keys_of(random_scores(own, w), None, None), x.counts(budget)[1], w
            )
            for x, own, w, budget in _zip(leaves, words, weights, budgets)
        ]

    return _by_kind(blocks, groups, leaves, weights, budgets)


def prune_all(
    leaves: Sequence[Patterned],
    masks: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    budgets: Sequence[Any],
    *,
    left: Callable[[int, Any], Any],
) -> list[jax.Array]:
    """Keep the units of largest magnitude, as `unstructured.prune` keeps weights.

    Args:
      leaves: whose masks they are.
      masks: bool arrays.
      weights: float arrays like the masks.
      budgets: for each how many weights are active in the end, scalar or per layer.
      left: from how many units a slice has, and how many in the end, to how many now.

    Returns:
      The new masks.
    """
    stay = [left(*x.counts(budget)) for x, budget in _zip(leaves, budgets)]

    def blocks(leaves, masks, weights, k):
        chosen = unstructured.prune_all(
            [x.tiles.any(mask) for x, mask in _zip(leaves, masks)],
            [x.pool(weight) for x, weight in _zip(leaves, weights)],
            k=k,
            axes=[x.layer_axes for x in leaves],
        )
        return _spread(leaves, chosen, weights)

    def groups(leaves, masks, weights, k):
        return [
            x.tiles.largest(keys_of(w, mask, mask, by_magnitude=True), n, w)
            for x, mask, w, n in _zip(leaves, masks, weights, k)
        ]

    return _by_kind(blocks, groups, leaves, masks, weights, stay)


def drop_and_grow_all(
    leaves: Sequence[Patterned],
    masks: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    *,
    grow: Sequence[jax.Array],
    budgets: Sequence[Any],
    n_drop: Callable[[Any], Any],
    grow_score: Callable[[jax.Array, jax.Array], jax.Array] = lambda grow, _: grow,
) -> list[jax.Array]:
    """Drop the units of least magnitude and grow others, as the pattern allows.

    Blocks are to a layer what weights are in `unstructured.drop_and_grow`. Of an N:M
    leaf the smallest weights of the whole layer are dropped, so that groups may lose
    more or less, and every group is then filled up to N where its own score is
    largest; as in SRigL, where the groups are neurons.

    Args:
      leaves: whose masks they are.
      masks: bool arrays.
      weights: float arrays like the masks.
      grow: for each what ``grow_score`` makes scores from.
      budgets: for each how many weights are active, scalar or per stacked layer.
      n_drop: from how many units of a layer are active to how many are dropped.
      grow_score: ``(grow, like) -> scores``, float arrays like what `Patterned.pool`
        returns; ranked by magnitude.

    Returns:
      The new masks.
    """

    def blocks(leaves, masks, weights, grow, budgets):
        active = [x.counts(budget)[1] for x, budget in _zip(leaves, budgets)]
        chosen = unstructured.drop_and_grow_all(
            [x.tiles.any(mask) for x, mask in _zip(leaves, masks)],
            [x.pool(weight) for x, weight in _zip(leaves, weights)],
            grow,
            active=active,
            n_drop=[n_drop(count) for count in active],
            axes=[x.layer_axes for x in leaves],
            grow_score=grow_score,
        )
        return _spread(leaves, chosen, weights)

    def groups(leaves, masks, weights, grow, budgets):
        kept = unstructured.prune_all(
            masks,
            weights,
            k=[budget - n_drop(budget) for budget in budgets],
            axes=[x.layer_axes for x in leaves],
        )
        new = []
        for x, mask, w, g, budget, stays in _zip(
            leaves, masks, weights, grow, budgets, kept
        ):
            keys = keys_of(grow_score(g, w), None, mask, by_magnitude=True)
            keys = jnp.where(stays, jnp.uint32(2**32 - 1), keys)
            new.append(x.tiles.largest(keys, x.counts(budget)[1], w))
        return new

    return _by_kind(blocks, groups, leaves, masks, weights, grow, budgets)


def _by_kind(blocks, groups, leaves, *lists):
    """Return masks in order, of leaves with blocks from one function for all of them.

    And of N:M leaves from the other.
    """
    rows = _zip(leaves, *lists)
    masks = {}
    for update, kind in ((blocks, Block), (groups, NM)):
        own = [row for row in rows if isinstance(row[0].pattern, kind)]
        if own:
            columns = [list(column) for column in _zip(*own)]
            paths = [leaf.path for leaf in columns[0]]
            masks |= dict(_zip(paths, update(*columns)))
    return [masks[leaf.path] for leaf in leaves]


def _spread(leaves, chosen, weights):
    """Return masks of weights from those of their blocks."""
    return [x.tiles.spread(one, w) for x, one, w in _zip(leaves, chosen, weights)]


def _zip(*lists):
    return list(zip(*lists, strict=True))
