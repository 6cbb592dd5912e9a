"""The one transformation behind every algorithm.

An algorithm is an `Algorithm`: when masks change and how. All else is here, once:
drawing masks, the conditional, accumulated gradients, the inner optimizer under the
mask, its slots, and the projection that leaves exact zeros.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding

from sparsejax.masks.initial import random_masks
from sparsejax.masks.layout import Leaf, named_leaves
from sparsejax.sparse_optax._conditional import change_if


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
      leaves: ``params -> {path: Leaf}``, what is sparse.
      due: ``step -> bool``: whether masks change; ``None``: they never do.
      change: ``(leaves, masks, Change) -> masks``, lists over the sparse leaves.
      needs_gradient: whether ``change`` reads gradients.
      accumulate: ``None``, or ``step -> (whether this gradient counts towards the
        next change, whether to start afresh afterwards)``.
      step_on_update: whether the inner optimizer steps on a call that changes masks.
    """

    name: str
    start: Callable[[optax.Params, jax.Array], tuple[Any, Any]]
    leaves: Callable[[optax.Params], dict[str, Leaf]]
    due: Callable[[jax.Array], jax.Array] | None = None
    change: Callable[..., list[jax.Array]] | None = None
    needs_gradient: bool = False
    accumulate: Callable[[jax.Array], tuple[jax.Array, jax.Array]] | None = None
    step_on_update: bool = True


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
            key=jax.random.key_data(random),
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
        check_same_leaves(f"{name}.update", params, state.masks)
        dense = updates if inner is not None else grad
        if algorithm.needs_gradient and dense is None:
            raise TypeError(
                f"{name} as the last link of a chain grows weights by their dense "
                "gradient, which earlier links have transformed. Pass it by keyword, "
                f"tx.update(grads, state, params, grad=grads), or use {name}(inner, "
                "...) around the optimizer."
            )
        masks, accumulated, due = _next_masks(algorithm, state, params, dense, key)
        inner_state = state.inner_state
        if inner is not None:
            # Slots are masked before the step and not after it: XLA fuses this, and a
            # weight that has just grown then starts from empty slots.
            inner_state = _mask_slots(around, inner_state, masks)
            if grad is not None:
                extra["grad"] = grad
            masked = where_sparse(lambda m, g: jnp.where(m, g, 0), masks, updates)
            updates, stepped = around.update(masked, inner_state, params, **extra)
            if algorithm.step_on_update or due is None:
                inner_state = stepped
            else:
                keep = functools.partial(jnp.where, due)
                inner_state = jax.tree.map(keep, inner_state, stepped)
                updates = jax.tree.map(lambda u: keep(0, u).astype(u.dtype), updates)
        return project(updates, params, masks), SparseState(
            count=optax.safe_increment(state.count),
            key=state.key,
            masks=masks,
            budgets=state.budgets,
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
        return jnp.where(mask, update.astype(param.dtype), -param)

    return where_sparse(leaf, masks, updates, params)


def where_sparse(
    f: Callable, masks: optax.Params, *trees: Any, dense: Any = ...
) -> Any:
    """Map ``f(mask, *leaves)`` over sparse leaves.

    Dense leaves are those of the first tree, or ``dense`` where that is given.
    """

    def leaf(mask, *leaves):
        if mask is not None:
            return f(mask, *leaves)
        return leaves[0] if dense is ... else dense

    return jax.tree.map(leaf, masks, *trees, is_leaf=lambda x: x is None)


def draw_masks(
    params: optax.Params,
    leaves: dict[str, Leaf],
    budgets: dict[str, Any],
    key: jax.Array,
) -> optax.Params:
    """Draw a random mask for every sparse leaf, sharded as the leaf is."""
    named = named_leaves(params)
    weights = {path: named[path] for path in leaves}
    keys = {p: jax.random.fold_in(key, path_hash(p)) for p in leaves}
    axes = tuple(x.layout.layer_axes(len(x.shape)) for x in leaves.values())
    shardings = tuple(_auto_sharding(weight) for weight in weights.values())
    ks = [budgets[path] for path in leaves]
    draw = _drawer(axes, shardings)
    masks = draw([*keys.values()], [*weights.values()], ks)
    drawn = dict(zip(leaves, masks, strict=True))
    return tree_of_leaves(params, leaves, lambda path, _: drawn[path])


def tree_of_leaves(
    params: optax.Params, leaves: dict[str, Leaf], f: Callable[[str, Any], Any]
) -> Any:
    """Return a tree like ``params`` of ``f(path, leaf)``; None where it is dense."""
    treedef = jax.tree.structure(params)
    named = named_leaves(params)
    return treedef.unflatten(
        [f(p, x) if p in leaves else None for p, x in named.items()]
    )


def path_hash(path: str) -> int:
    """Return 32 bits that tell a path, so that keys do not depend on other leaves."""
    return zlib.crc32(path.encode())


def check_same_leaves(what: str, params: Any, masks: Any) -> None:
    """Raise ValueError unless every mask fits the parameter of the same path."""
    shapes = {path: leaf.shape for path, leaf in named_leaves(params).items()}
    for path, mask in named_leaves(masks).items():
        if path not in shapes:
            raise ValueError(
                f"{what}: there is a mask for {path} and no such parameter; the masks "
                f"belong to another model. The parameters are: {', '.join(shapes)}."
            )
        if mask.shape != shapes[path]:
            raise ValueError(
                f"{what}: the mask of {path} must have the shape of the parameter, "
                f"{shapes[path]}, got {mask.shape}; the masks belong to another model."
            )


def _next_masks(algorithm, state, params, gradients, key):
    """Return masks, accumulated gradients, and whether masks change at this step."""
    if algorithm.due is None:
        return state.masks, state.accumulated, None
    due = algorithm.due(state.count)
    accumulated = state.accumulated
    if algorithm.accumulate is not None:
        counts, restart = algorithm.accumulate(state.count)
        gradients = where_sparse(
            lambda _, total, g: total + jnp.where(counts, g.astype(total.dtype), 0),
            state.masks,
            accumulated,
            gradients,
            dense=None,
        )
        accumulated = jax.tree.map(
            lambda total: jnp.where(restart, 0, total), gradients
        )

    at_masks = lambda tree: jax.tree.leaves(
        where_sparse(lambda _, x: x, state.masks, tree, dense=None)
    )
    impl = None if key is None else jax.random.key_impl(key)
    operands = Change(
        step=state.count,
        key=state.key,
        weights=at_masks(params),
        gradients=at_masks(gradients) if algorithm.needs_gradient else None,
        budgets=state.budgets,
    )
    leaves = list(algorithm.leaves(params).values())

    def change(masks, operands):
        random = jax.random.wrap_key_data(operands.key, impl=impl)
        random = jax.random.fold_in(random, operands.step)
        return algorithm.change(leaves, masks, operands._replace(key=random))

    old, treedef = jax.tree.flatten(state.masks)
    return treedef.unflatten(change_if(due, change, old, operands)), accumulated, due


def _mask_slots(inner, inner_state, masks):
    """Zero the param-shaped slots of ``inner`` off the mask."""

    def clear(slot, mask):
        fits = mask is not None and getattr(slot, "shape", None) == mask.shape
        return jnp.where(mask, slot, 0).astype(slot.dtype) if fits else slot

    placeholder = lambda x: x is None or isinstance(x, optax.MaskedNode)
    return optax.tree.map_params(inner, clear, inner_state, masks, is_leaf=placeholder)


@functools.lru_cache(maxsize=64)
def _drawer(axes, shardings):
    """Return `random_masks` compiled for slices along ``axes``."""
    draw = functools.partial(random_masks, axes=axes)
    if all(sharding is None for sharding in shardings):
        return jax.jit(draw)
    return jax.jit(draw, out_shardings=list(shardings))


def _auto_sharding(weight):
    """Return the sharding to ask XLA for; traced and explicit types carry their own."""
    if isinstance(weight, jax.core.Tracer) or not isinstance(weight, jax.Array):
        return None
    sharding = weight.sharding
    if not isinstance(sharding, NamedSharding):
        return None
    auto = all(kind == AxisType.Auto for kind in sharding.mesh.axis_types)
    return sharding if auto else None
