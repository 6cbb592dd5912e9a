"""Masks and optimizer states: find them, apply them, start afresh under them."""

import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sparsejax._request import check_key
from sparsejax._trees import check_same_leaves
from sparsejax.masks.blend import masked
from sparsejax.masks.initial import sparse_init
from sparsejax.masks.layout import Layout, layouts_of, named_leaves, path_name
from sparsejax.sparse_optax._core import SparseState


def get_masks(opt_state: optax.OptState) -> Any:
    """Return the masks that an optimizer state holds.

    They are found at any depth: in chains, `optax.MultiSteps`,
    `optax.inject_hyperparams`, `optax.partition`, in the state of an `nnx.Optimizer`
    or of a Flax ``TrainState``. Where several sparse transformations share the
    parameters among them, as under `optax.partition`, their masks are merged.

    Args:
      opt_state: state of a transformation that contains one of this package's.

    Returns:
      Tree like the parameters: bool arrays, ``True`` where a weight is active, and
      ``None`` where a leaf is dense. NNX variables appear as their arrays.

    Raises:
      ValueError: there is no sparse transformation in it, or two of them mask the
        same parameter.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from sparsejax import sparse_optax
      >>> params = {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)}
      >>> tx = sparse_optax.static(optax.adam(1e-3), sparsity=0.8)
      >>> masks = sparse_optax.get_masks(tx.init(params))
      >>> int(masks["kernel"].sum()), masks["bias"]
      (4, None)
    """
    is_state = lambda x: isinstance(x, SparseState)
    states = [x for x in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(x)]
    if not states:
        raise ValueError(
            "get_masks: the optimizer state must come from a sparse_optax "
            f"transformation, and none was found in a {type(opt_state).__name__}."
        )
    merged = nnx.as_pure(states[0].masks)
    for state in states[1:]:
        merged = _merge(merged, nnx.as_pure(state.masks))
    is_none = lambda x: x is None or isinstance(x, optax.MaskedNode)
    as_none = lambda x: None if is_none(x) else x
    return jax.tree.map(as_none, merged, is_leaf=is_none)


def apply_masks(params: optax.Params, opt_state: optax.OptState) -> optax.Params:
    """Set parameters off the mask to exactly 0.

    A transformation cannot change parameters when it is initialised; do it so before
    step one. The first update does it in any case.

    Args:
      params: the parameters that ``opt_state`` was initialised with.
      opt_state: as for `get_masks`.

    Returns:
      Tree like ``params``.

    Raises:
      ValueError: as `get_masks`, or the masks belong to other parameters.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from sparsejax import sparse_optax
      >>> params = {"kernel": jnp.ones((4, 5))}
      >>> opt_state = sparse_optax.static(optax.sgd(0.1), sparsity=0.8).init(params)
      >>> float(sparse_optax.apply_masks(params, opt_state)["kernel"].sum())
      4.0
    """
    apply = lambda path, mask, param: masked(mask, param)
    return _at_masks("apply_masks", apply, params, opt_state)


def reinitialize(
    params: optax.Params,
    opt_state: optax.OptState,
    *,
    key: jax.Array,
    variant: Literal["variance", "std"] = "variance",
    layout: dict[str, Layout] | None = None,
) -> optax.Params:
    """Draw the active weights of sparse leaves afresh, each for its own fan-in.

    Dense leaves, and leaves whose mask is all active, keep their values, and so do the
    vectors that are masked with ablated or removed channels.

    Args:
      params: the parameters that ``opt_state`` was initialised with.
      opt_state: as for `get_masks`.
      key: a PRNG key; a leaf's own is folded from its path.
      variant: as in `sparsejax.masks.sparse_init`.
      layout: as in the factories: dict from path regex to layout.

    Returns:
      Tree like ``params``, exactly 0 off the mask.

    Raises:
      ValueError: as `apply_masks` and `sparsejax.masks.sparse_init`.
    """
    check_key("reinitialize", key)
    layouts = layouts_of(params, layout)

    def redraw(path, mask, param):
        if param.ndim < 2:
            return masked(mask, param)
        own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        drawn = sparse_init(own_key, param, mask, layout=layouts[path], variant=variant)
        return jnp.where(jnp.all(mask), param, drawn)

    return _at_masks("reinitialize", redraw, params, opt_state)


def _at_masks(what, f, params, opt_state):
    """Map ``f(path, mask, param)`` over sparse leaves, matched by path."""
    masks = named_leaves(get_masks(opt_state))
    check_same_leaves(what, params, masks)
    leaves = [
        f(path, masks[path], param) if path in masks else param
        for path, param in named_leaves(params).items()
    ]
    return jax.tree.structure(params).unflatten(leaves)


def _merge(a, b, path=()):
    """Merge two trees of masks, of which each has none where the other has some."""
    nothing = lambda x: x is None or isinstance(x, optax.MaskedNode)
    if nothing(a) or nothing(b):
        return b if nothing(a) else a
    children = lambda tree: jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: x is not tree
    )
    (of_a, treedef), (of_b, _) = children(a), children(b)
    if jax.tree_util.treedef_is_leaf(treedef):
        raise ValueError(
            f"get_masks: two sparse transformations mask {path_name(path)}; use one of "
            "them, or give each its own leaves."
        )
    pairs = zip(of_a, of_b, strict=True)
    return treedef.unflatten([_merge(x, y, path + p) for (p, x), (_, y) in pairs])
