"""The state of an optimizer for the smaller model."""

from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from sparsejax.compaction.errors import CompactionError
from sparsejax.compaction.plan import Plan
from sparsejax.compaction.rebuild import check_plan
from sparsejax.compaction.slicing import take
from sparsejax.masks.layout import named_leaves, path_name

S = TypeVar("S")


def slice_optimizer_state(opt_state: S, params: Any, plan: Plan) -> S:
    """Return what is left of an optimizer's state.

    A slot belongs to the parameter whose path its own path ends with, and has the shape
    of that parameter: momentum, second moments, accumulated gradients, masks. That
    holds in chains, under wrappers, and in ``nnx.Optimizer``. Everything else stays as
    it is, among it the budgets of `sparsejax.sparse_optax`, which count the weights of
    the full model.

    Args:
      opt_state: state of an optax transformation, or ``opt_state`` of an
        ``nnx.Optimizer``.
      params: the full module, or the tree of parameters that the state was made for.
      plan: what is left of each parameter.

    Returns:
      A tree like ``opt_state``.

    Raises:
      CompactionError: a slot of a parameter that shrinks is of another shape, as the
        factored second moments of Adafactor are, which are means over what is removed;
        or a fold makes a new bias, which has no slots.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> import optax
      >>> from sparsejax import compaction
      >>> params = {"fc": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
      >>> state = optax.adam(1e-3).init(params)
      >>> kept = np.array([0, 2])
      >>> plan = compaction.Plan({"fc/kernel": (None, kept), "fc/bias": (kept,)})
      >>> small = compaction.slice_optimizer_state(state, params, plan)
      >>> small[0].mu["fc"]["kernel"].shape, small[0].count.shape
      ((3, 2), ())
    """
    tree = nnx.state(params) if isinstance(params, nnx.Module) else params
    shapes = {path: np.shape(leaf) for path, leaf in named_leaves(tree).items()}
    ours = {path: keep for path, keep in plan.keep.items() if path in shapes}
    check_plan(Plan(ours), named_leaves(tree))
    shrinks = {p for p, keep in ours.items() if any(k is not None for k in keep)}

    def leaf(keys, slot):
        path = path_name(keys)
        owner = _owner(path, shapes)
        if owner is not None:
            _check_bias(path, owner, plan, shapes)
        if owner not in shrinks or _is_count(slot, shapes[owner], ours[owner]):
            return slot
        if np.shape(slot) != shapes[owner]:
            raise CompactionError(
                f"{path}: a slot of {owner} must have the shape of the full parameter, "
                f"{shapes[owner]}, to be sliced, got {np.shape(slot)}. Give the state "
                "and the parameters of the full model; a state with factored slots "
                "cannot be sliced exactly: start it anew with tx.init(small_params)."
            )
        return take(slot, ours[owner])

    return jax.tree_util.tree_map_with_path(leaf, opt_state)


def _owner(path: str, shapes: dict[str, Any]) -> str | None:
    """Return the parameter with the longest path that ``path`` ends with."""
    keys = path.split("/")
    ends = ("/".join(keys[start:]) for start in range(len(keys)))
    return next((end for end in ends if end in shapes), None)


def _is_count(slot, shape, keep) -> bool:
    """Tell whether a slot is one number, or an integer for each stacked layer."""
    own = np.shape(slot)
    if own == shape or np.size(slot) == 1:
        return own != shape
    stacked = own == shape[: len(own)] and all(k is None for k in keep[: len(own)])
    return stacked and np.issubdtype(slot.dtype, np.integer)


def _check_bias(path, owner, plan, shapes) -> None:
    bias = f"{owner.removesuffix('kernel')}bias"
    if owner in plan.folds and bias not in shapes:
        raise CompactionError(
            f"{path}: folding constants gives {owner} a bias that the full model has "
            'not, and so no slots for it. Pass constants="keep", or start the state '
            "anew with tx.init(small_params)."
        )
