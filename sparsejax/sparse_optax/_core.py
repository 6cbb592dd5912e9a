"""The one transformation behind every algorithm.

An algorithm is an `Algorithm`: when masks change and how. All else is here, once:
drawing masks, the conditional, accumulated gradients, the inner optimizer under the
mask, its slots, and the projection that leaves exact zeros.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from sparsejax._trees import (
    check_gradients,
    check_same_tree,
    sparse_leaves,
    where_sparse,
)
from sparsejax.masks.blend import blend, masked
from sparsejax.masks.layout import Layout, Leaf, layouts_of, named_leaves
from sparsejax.sparse_optax._conditional import change_if

# From parameters and a key to masks and budgets, trees as in `SparseState`.
Start = Callable[[Any, jax.Array], tuple[Any, Any]]


class SparseState(NamedTuple):
    """State of every sparse transformation.

    Trees are like the parameters; a leaf is None where the parameter is dense.
    """

    count: chex.Array  # shape=(), dtype=jnp.int32: completed update calls
    key: chex.Array  # dtype=jnp.uint32: data of the PRNG key
    masks: optax.Params  # bool: True where a weight is active
    budgets: Any  # int32: weights kept, per leaf or layer of it, or of all together
    accumulated: Any  # float32: summed gradients, None unless they are accumulated
    inner_state: optax.OptState  # () without an inner optimizer


class Change(NamedTuple):
    """What a change of masks may read. Lists run over the sparse leaves."""

    step: jax.Array
    key: jax.Array
    weights: list[jax.Array]
    gradients: list[jax.Array] | None
    budgets: Any


class Algorithm(NamedTuple):
    """What tells one sparse-training algorithm from another.

    Attributes:
      name: of the factory, for errors.
      start: ``(params, key) -> (masks, budgets)``, trees as in `SparseState`.
      layout: what the factory was given.
      due: ``step -> bool``: whether masks change; None: they never do.
      change: ``(leaves, masks, Change) -> masks``, lists over the sparse leaves.
      needs_gradient: whether ``change`` reads gradients.
      accumulate: None, or ``step -> (whether this gradient counts towards the next
        change, whether to start afresh afterwards)``.
      step_on_update: whether the inner optimizer steps on a call that changes masks.
      changes_budgets: whether ``change`` returns ``(masks, budgets)``.
    """

    name: str
    start: Start
    layout: Mapping[str, Layout] | None = None
    due: Callable[[jax.Array], jax.Array] | None = None
    change: Callable[..., Any] | None = None
    needs_gradient: bool = False
    accumulate: Callable[[jax.Array], tuple[jax.Array, jax.Array]] | None = None
    step_on_update: bool = True
    changes_budgets: bool = False


def transformation(
    algorithm: Algorithm,
    inner: optax.GradientTransformation | None,
    key: jax.Array | None,
) -> optax.GradientTransformationExtraArgs:
    """Build the transformation, around ``inner`` or as the last link of a chain."""
    name = algorithm.name
    if inner is not None and not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(
            f"{name}(inner): the first argument must be an optax transformation or "
            f"None, got {type(inner).__name__}; pass sparsity=... by keyword."
        )
    around = optax.identity() if inner is None else inner
    around = optax.with_extra_args_support(around)

    def init_fn(params):
        random = jax.random.key(0) if key is None else key
        masks, budgets = algorithm.start(params, random)
        accumulated = None
        if algorithm.accumulate is not None:
            accumulated = where_sparse(
                lambda _, p: jnp.zeros_like(p, jnp.float32), masks, params, dense=None
            )
        return SparseState(
            count=jnp.zeros((), jnp.int32),
            key=jnp.array(jax.random.key_data(random)),  # a copy: states are donated
            masks=masks,
            budgets=budgets,
            accumulated=accumulated,
            inner_state=around.init(params) if inner is not None else (),
        )

    def update_fn(updates, state, params=None, *, grad=None, **extra):
        if params is None:
            raise ValueError(
                f"{name}: update needs the parameters; call tx.update(updates, state, "
                "params)."
            )
        if not isinstance(state, SparseState):
            raise TypeError(
                f"{name}.update: the state must be the SparseState that init returns, "
                f"got {type(state).__name__}."
            )
        if (state.accumulated is None) != (algorithm.accumulate is None):
            raise ValueError(
                f"{name}.update: the state comes from a transformation with another "
                "accumulate=...; build it as it was built when the state was made."
            )
        check_same_tree(f"{name}.update", params, state.masks)
        check_gradients(f"{name}.update(updates)", updates, state.masks)
        dense = updates if inner is not None else grad
        if algorithm.needs_gradient and dense is None:
            raise TypeError(
                f"{name} as the last link of a chain grows weights by their dense "
                "gradient, which earlier links have transformed. Pass it by keyword, "
                f"tx.update(grads, state, params, grad=grads), or use {name}(inner, "
                "...) around the optimizer."
            )
        if inner is None and algorithm.needs_gradient:
            check_gradients(f"{name}.update(grad=...)", grad, state.masks)
        masks, budgets, accumulated, due = _next_masks(
            algorithm, state, params, dense, key
        )
        inner_state = state.inner_state
        if inner is not None:
            # Slots are masked before the step and not after it: XLA fuses this, and a
            # weight that has just grown then starts from empty slots.
            inner_state = _mask_slots(around, inner_state, masks)
            if grad is not None:
                extra["grad"] = grad
            updates = where_sparse(masked, masks, updates)
            before = inner_state
            updates, inner_state = around.update(updates, before, params, **extra)
            if due is not None and not algorithm.step_on_update:
                unless_due = functools.partial(jnp.where, due)
                inner_state = jax.tree.map(unless_due, before, inner_state)
        if due is not None and not algorithm.step_on_update:
            still = lambda u: jnp.where(due, jnp.zeros_like(u), u)
            updates = jax.tree.map(still, updates)
        return project(updates, params, masks), SparseState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            key=state.key,
            masks=masks,
            budgets=budgets,
            accumulated=accumulated,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def project(
    updates: optax.Updates, params: optax.Params, masks: optax.Params
) -> optax.Updates:
    """Replace updates off the mask by -params, so that applying them gives exact 0.

    The result has the dtype of the parameter: in a narrower one ``-p`` would be
    rounded and miss zero. A select, and not a product, so that NaN does not spread.
    """

    def leaf(mask, update, param):
        return blend(mask, update.astype(param.dtype), -param)

    return where_sparse(leaf, masks, updates, params)


def _next_masks(algorithm, state, params, gradients, key):
    """Return masks, budgets, summed gradients, and whether masks change now."""
    if algorithm.due is None:
        return state.masks, state.budgets, state.accumulated, None
    due = algorithm.due(state.count)
    accumulated = state.accumulated
    if algorithm.accumulate is not None:
        counts, restart = algorithm.accumulate(state.count)
        add = lambda _, total, g: total + jnp.where(counts, g.astype(total.dtype), 0)
        gradients = where_sparse(add, state.masks, accumulated, gradients, dense=None)
        empty = lambda total: jnp.where(restart, 0, total)
        accumulated = jax.tree.map(empty, gradients)

    layouts = layouts_of(params, algorithm.layout)
    leaves = [
        Leaf(path, mask.shape, layouts[path], sparsity=None)
        for path, mask in named_leaves(state.masks).items()
    ]
    impl = None if key is None else jax.random.key_impl(key)

    changes_budgets = algorithm.changes_budgets
    changing = (state.masks, state.budgets) if changes_budgets else state.masks
    arrays, treedef = jax.tree.flatten(changing)

    def change(arrays, now):
        random = jax.random.wrap_key_data(now.key, impl=impl)
        now = now._replace(key=jax.random.fold_in(random, now.step))
        changed = algorithm.change(leaves, arrays[: len(leaves)], now)
        return jax.tree.leaves(changed)

    now = Change(
        step=state.count,
        key=state.key,
        weights=sparse_leaves(state.masks, params),
        gradients=None,
        budgets=state.budgets,
    )
    if algorithm.needs_gradient:
        now = now._replace(gradients=sparse_leaves(state.masks, gradients))
    changed = treedef.unflatten(change_if(due, change, arrays, now))
    masks, budgets = changed if changes_budgets else (changed, state.budgets)
    return masks, budgets, accumulated, due


def _mask_slots(inner, inner_state, masks):
    """Zero the param-shaped slots of ``inner`` off the mask."""

    def clear(slot, mask):
        fits = (
            isinstance(mask, jax.Array) and getattr(slot, "shape", None) == mask.shape
        )
        return masked(mask, slot) if fits else slot

    placeholder = lambda x: x is None or isinstance(x, optax.MaskedNode)
    return optax.tree.map_params(inner, clear, inner_state, masks, is_leaf=placeholder)
