"""Magnitude pruning: dense at first, then sparser by a cubic schedule, or at once."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from sparsejax._request import Request, Scope, check_key
from sparsejax._trees import tree_at
from sparsejax.distributions import Distribution
from sparsejax.masks.layout import Layout, Where, named_leaves
from sparsejax.masks.patterned import Patterns, prune_all
from sparsejax.masks.unstructured import prune_together
from sparsejax.schedules import Periodic, cubic_progress, share
from sparsejax.sparse_optax._core import Algorithm, transformation


def magnitude(
    inner: optax.GradientTransformation | None = None,
    *,
    sparsity: float,
    scope: Scope = "layer",
    distribution: str | Distribution = "erk",
    where: Where = None,
    layout: Mapping[str, Layout] | None = None,
    pattern: Patterns = None,
    key: jax.Array | None = None,
    start_at: int = 0,
    update_every: int = 100,
    stop_at: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prune the weights of least magnitude, gradually or in one shot.

    Masks are all active at first. They shrink at the multiples of ``update_every`` in
    [start_at, stop_at), along `sparsejax.schedules.cubic_progress`, and have the
    target sparsity after the last of these steps. Where there is none, and where
    ``stop_at`` is None or equals ``start_at``, all pruning happens at ``start_at``.
    Pruned weights never return.

    Args:
      inner: the optimizer to run under the mask; None makes this the last link of a
        chain.
      sparsity: final fraction of weights that are zero, in [0, 1).
      scope: "layer" prunes each layer to what ``distribution`` says; "global" ranks
        the weights of all sparse leaves together and leaves ``distribution`` aside.
      distribution: as in `rigl`.
      where: as in `rigl`; with "global" scope, a dict may only say 0.
      layout: as in `rigl`.
      pattern: as in `rigl`, with "layer" scope. The schedule counts blocks, and what
        stays of the ``m`` weights of a group: it falls from ``m`` to ``n``.
      key: PRNG key; pruning draws nothing from it.
      start_at: first step at which weights may be pruned.
      update_every: steps between updates.
      stop_at: no update from this step on.

    Returns:
      An optax transformation with a `SparseState`.

    Raises:
      ValueError, TypeError: arguments that cannot be meant, here; a tree that does not
        fit, at ``init``.

    References:
      Zhu and Gupta 2017, "To prune, or not to prune", section 3.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from sparsejax import sparse_optax
      >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
      >>> tx = sparse_optax.magnitude(optax.sgd(0.0), sparsity=0.75)
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 7.0, 8.0]]
    """
    request = Request(
        "magnitude", sparsity, distribution, where, layout, pattern
    ).check()
    check_key("magnitude", key)
    period = Periodic(start_at, update_every, stop_at).check("magnitude")
    request.check_scope(scope)
    last = period.last
    progress = cubic_progress(start_at, start_at if last is None else last)

    def start(params, _):
        leaves = request.leaves(params)
        named = named_leaves(params)
        active = {path: jnp.ones_like(named[path], dtype=bool) for path in leaves}
        if scope == "layer":
            return tree_at(params, active), tree_at(params, request.budgets(leaves))
        return tree_at(params, active), jnp.int32(request.budget_of_all(leaves))

    def due(step):
        return step == start_at if last is None else period.due(step)

    def left(size, budget, step):
        return size - share(size - budget, progress(step))

    def change_layers(leaves, masks, now):
        return prune_all(
            request.patterned(leaves),
            masks,
            now.weights,
            jax.tree.leaves(now.budgets),
            left=functools.partial(left, step=now.step),
        )

    def change_all(leaves, masks, now):
        dtype = jnp.result_type(*now.weights)
        weights = [weight.astype(dtype) for weight in now.weights]
        size = sum(mask.size for mask in masks)
        return prune_together(masks, weights, left(size, now.budgets, now.step))

    change = change_layers if scope == "layer" else change_all
    algorithm = Algorithm("magnitude", start, layout, due, change)
    return transformation(algorithm, inner, key)
