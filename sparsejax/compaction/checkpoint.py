"""Checkpoints of compacted models: the plan beside what is left of the parameters.

The full architecture is code, the plan says what is left of it: together they give the
small model its shapes again.
"""

import os
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

from sparsejax._trees import first_difference
from sparsejax.compaction.errors import CompactionError
from sparsejax.compaction.plan import Plan
from sparsejax.compaction.rebuild import rebuild
from sparsejax.masks.layout import named_leaves

_KIND = "sparsejax.compaction"
M = TypeVar("M", bound=nnx.Module)


def save(
    path: str | os.PathLike,
    small: nnx.Module,
    plan: Any,
    *,
    overwrite: bool = False,
) -> None:
    """Write a compacted model and its plan to a new directory.

    The directory appears when all is written. One that is to be replaced is removed
    before.

    Args:
      path: of the directory.
      small: the compacted model; it may have been trained further.
      plan: the report or the `Plan` that it was compacted by.
      overwrite: whether to replace what is at ``path``.

    Raises:
      FileExistsError: there is something at ``path``.
      CompactionError: ``plan`` is neither a report nor a plan.
    """
    plan = getattr(plan, "plan", plan)
    if not isinstance(plan, Plan):
        raise CompactionError(
            "save(path, small, plan) takes the report of compact() or its plan, got "
            f"{type(plan).__name__}."
        )
    path = _absolute(path)
    if not overwrite and os.path.lexists(path):
        raise FileExistsError(
            f"{path} exists; choose another path, or pass overwrite=True."
        )
    leaves = named_leaves(nnx.state(small))
    about = {"kind": _KIND, "plan": _to_json(plan), "parameters": _described(leaves)}
    # Orbax refuses arrays without elements; the plan knows their shapes.
    arrays = {name: leaf for name, leaf in leaves.items() if np.size(leaf)}
    ocp.save_checkpointables(
        path, {"model": arrays}, overwrite=overwrite, custom_metadata=about
    )


def restore(path: str | os.PathLike, model: M) -> M:
    """Read what `save` wrote.

    Args:
      path: of the directory.
      model: the full architecture, as ``nnx.eval_shape(lambda: Model(...))`` makes it;
        a real model does as well, and stays as it is. Parameters are placed as those
        of ``model`` are sharded, otherwise on the default device.

    Returns:
      The compacted model.

    Raises:
      FileNotFoundError: there is nothing at ``path``.
      CompactionError: what is there is not a whole checkpoint of a compacted model, or
        it is one of another architecture.
    """
    path = _absolute(path)
    about = _read_about(path)
    try:
        small = rebuild(_abstract(model), _from_json(about["plan"]))
    except CompactionError as error:
        raise CompactionError(f"{path}: {error}") from error
    graphdef, state = nnx.split(small)
    leaves, treedef = named_leaves(state), jax.tree.structure(state)
    _check_same(path, about["parameters"], _described(leaves))
    leaves = {name: _placed(leaf) for name, leaf in leaves.items()}
    stored = {name: leaf for name, leaf in leaves.items() if leaf.size}
    try:
        arrays = ocp.load_checkpointables(path, {"model": stored})["model"]
    except Exception as error:
        raise CompactionError(
            f"{path}: the parameters cannot be read; the checkpoint is damaged: {error}"
        ) from error
    empty = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    filled = [arrays[n] if n in arrays else empty(leaf) for n, leaf in leaves.items()]
    return nnx.merge(graphdef, treedef.unflatten(filled))


def _absolute(path: str | os.PathLike) -> str:
    path = os.fspath(path)
    return path if "://" in path else os.path.abspath(path)


def _abstract(model: M) -> M:
    """Return the model with shapes in the place of arrays."""
    graphdef, state = nnx.split(model)

    def leaf(x):
        sharding = getattr(x, "sharding", None)
        return jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x), sharding=sharding)

    return nnx.merge(graphdef, jax.tree.map(leaf, state))


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Return a leaf that is on the default device unless it is sharded."""
    sharding = leaf.sharding or jnp.zeros(()).sharding
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _described(leaves: dict[str, Any]) -> dict[str, list[Any]]:
    """Return shapes and dtypes by path."""
    return {
        path: [list(np.shape(leaf)), str(jnp.result_type(leaf))]
        for path, leaf in leaves.items()
    }


def _check_same(path: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    if differing := first_difference(there, here):
        name, theirs, ours = differing
        raise CompactionError(
            f"{path}: the checkpoint is of another architecture. {name} (shape and "
            f"dtype, compacted) is {theirs} there and {ours} in the model; pass the "
            "architecture that was compacted."
        )


def _read_about(path: str) -> dict[str, Any]:
    """Return what `save` wrote beside the arrays."""
    if "://" not in path and not os.path.exists(path):
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    try:
        about = ocp.checkpointables_metadata(path).custom_metadata
    except Exception as error:
        raise CompactionError(
            f"{path}: no checkpoint of a compacted model, or a damaged one: {error}"
        ) from error
    if not isinstance(about, dict) or about.get("kind") != _KIND:
        raise CompactionError(
            f"{path}: a checkpoint that compaction.save did not write, or a damaged "
            "one: it holds no plan."
        )
    return about


def _to_json(plan: Plan) -> dict[str, Any]:
    listed = lambda kept: None if kept is None else np.asarray(kept).tolist()
    return {
        "keep": {path: [listed(k) for k in keep] for path, keep in plan.keep.items()},
        "feature_groups": {path: int(n) for path, n in plan.feature_groups.items()},
        "factors": [
            [path, axis, [int(n) for n in factors]]
            for (path, axis), factors in plan.factors.items()
        ],
        "folds": {
            path: [str(np.asarray(fold).dtype), np.asarray(fold).tolist()]
            for path, fold in plan.folds.items()
        },
    }


def _from_json(stored: dict[str, Any]) -> Plan:
    indices = lambda kept: None if kept is None else np.array(kept, np.int64)
    return Plan(
        keep={path: tuple(map(indices, k)) for path, k in stored["keep"].items()},
        feature_groups=dict(stored["feature_groups"]),
        factors={(path, axis): tuple(n) for path, axis, n in stored["factors"]},
        folds={
            path: np.array(values, jnp.dtype(dtype))
            for path, (dtype, values) in stored["folds"].items()
        },
    )
