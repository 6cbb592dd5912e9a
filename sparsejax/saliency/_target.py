"""What is to be sparse, how much of it stays, and the masks that scores then give."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.core import Tracer

from sparsejax._request import Request, Scope
from sparsejax._trees import tree_at
from sparsejax.distributions import Distribution
from sparsejax.masks.layout import Layout, Leaf, Where, named_leaves
from sparsejax.masks.selection import global_top_k_mask, top_k_masks


@dataclasses.dataclass(frozen=True)
class Target:
    """The weights of a tree that are to be sparse; lists run over them in its order.

    Attributes:
      owner: the function that was called, for errors.
      leaves: which they are.
      scope: what a number kept is counted over.
      sizes: how many weights there are, in all with "global" scope, else in a layer of
        each leaf.
      kept: how many of them stay active; for a leaf of stacked layers, in each.
    """

    owner: str
    leaves: Sequence[Leaf]
    scope: Scope
    sizes: Sequence[int]
    kept: Sequence[chex.Numeric]

    def weights(self, params: Any) -> list[jax.Array]:
        """Take the weights out of the tree."""
        named = named_leaves(params)
        return [named[leaf.path] for leaf in self.leaves]

    def replace(self, params: Any, weights: Sequence[jax.Array]) -> Any:
        """Put other weights into the tree."""
        return jax.tree.structure(params).unflatten(
            {**named_leaves(params), **self._named(weights)}.values()
        )

    def select(
        self,
        scores: Sequence[jax.Array],
        kept: Sequence[chex.Numeric],
        where: Sequence[jax.Array] | None = None,
    ) -> list[jax.Array]:
        """Return masks of the ``kept`` highest scores among those eligible."""
        if self.scope == "global":
            masks: Any = global_top_k_mask(list(scores), kept[0], where=where)
            return masks
        axes = [leaf.layout.layer_axes(len(leaf.shape)) for leaf in self.leaves]
        return top_k_masks(scores, kept, axis=axes, where=where)

    def masks(self, params: Any, scores: Sequence[jax.Array]) -> Any:
        """Return the masks of the highest scores, a tree like ``params``.

        Raises:
          ValueError: a score is NaN.
        """
        scores = [score.astype(jnp.float32) for score in scores]
        for leaf, score in zip(self.leaves, scores, strict=True):
            if not isinstance(score, Tracer) and jnp.isnan(score).any():
                raise ValueError(
                    f"{self.owner}: every score must be a number, and "
                    f"{int(jnp.isnan(score).sum())} of {leaf.path} are NaN; look for "
                    "NaN in the weights, in the loss and in its gradients."
                )
        return self.tree(params, self.select(scores, self.kept))

    def tree(self, params: Any, masks: Sequence[jax.Array]) -> Any:
        """Return a tree like ``params`` of masks, None where a leaf is dense."""
        return tree_at(params, self._named(masks))

    def _named(self, arrays: Sequence[jax.Array]) -> dict[str, jax.Array]:
        paths = [leaf.path for leaf in self.leaves]
        return dict(zip(paths, arrays, strict=True))


def target(
    owner: str,
    params: Any,
    sparsity: float,
    scope: Scope,
    distribution: str | Distribution,
    where: Where,
    layout: Mapping[str, Layout] | None,
) -> Target:
    """Read what was asked for; arguments and errors are those of `magnitude`."""
    request = Request(owner, sparsity, distribution, where, layout).check()
    request.check_scope(scope)
    found = request.leaves(params)
    leaves = list(found.values())
    if scope == "global":
        size = sum(math.prod(leaf.shape) for leaf in leaves)
        return Target(owner, leaves, scope, [size], [request.budget_of_all(found)])
    budgets = request.budgets(found)
    sizes = [math.prod(leaf.layout.layer_shape(leaf.shape)) for leaf in leaves]
    kept = [budgets[leaf.path] for leaf in leaves]
    return Target(owner, leaves, scope, sizes, kept)
