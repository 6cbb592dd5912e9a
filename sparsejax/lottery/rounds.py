"""Rounds of iterative magnitude pruning as checkpoints: whole, or not there at all."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from sparsejax._trees import first_difference, tree_at
from sparsejax.lottery.imp import Round, State
from sparsejax.masks.layout import named_leaves

_KIND = "sparsejax.lottery"


def save_round(folder: str | os.PathLike, round_: Round) -> None:
    """Write a round into a folder of rounds.

    It is there when all of it is written. Each can be resumed from: the snapshot is in
    it.

    Args:
      folder: of the rounds; made if it is missing.
      round_: what `iterative_magnitude_pruning` yields.

    Raises:
      FileExistsError: there is a round of this index; it stays as it is.
    """
    trees = {"masks": round_.masks, "state": round_.state, "snapshot": round_.snapshot}
    arrays = {
        name: {p: _array(x) for p, x in named_leaves(tree).items()}
        for name, tree in trees.items()
    }
    about: Any = {"kind": _KIND, **{n: _described(x) for n, x in arrays.items()}}
    with _rounds(folder) as rounds:
        if round_.index in _indices(rounds):
            raise FileExistsError(
                f"{folder} has a round {round_.index}; save to another folder, or "
                "remove it."
            )
        rounds.save_checkpointables(
            round_.index, arrays, force=True, custom_metadata=about
        )


def restore_round(
    folder: str | os.PathLike,
    state: State,
    index: int | None = None,
    *,
    params_of: Callable[[State], Any] = lambda state: state,
) -> Round | None:
    """Read a round that `save_round` wrote.

    Args:
      folder: of the rounds.
      state: a state like those of the round, of arrays or `jax.ShapeDtypeStruct`;
        arrays are placed as its own are.
      index: of the round; None: the last one.
      params_of: as in `iterative_magnitude_pruning`.

    Returns:
      The `Round`; None where ``index`` is None and there are no rounds.

    Raises:
      ValueError: there is no such round, it cannot be read, or it is one of another
        state. Nothing is changed.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from sparsejax import lottery
      >>> params = {"w": jnp.ones((2, 2)), "bias": jnp.ones(2)}
      >>> train = lambda params, masks, index: (params, None)
      >>> rounds = lottery.iterative_magnitude_pruning(train, params, rounds=0)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     lottery.save_round(folder, next(rounds))
      ...     last = lottery.restore_round(folder, params)
      >>> last.index, last.masks["w"].tolist(), last.masks["bias"]
      (0, [[True, True], [True, True]], None)
    """
    leaves = {name: _abstract(leaf) for name, leaf in named_leaves(state).items()}
    params = params_of(jax.tree.structure(state).unflatten(leaves.values()))
    with _rounds(folder) as rounds:
        there = _indices(rounds)
        if index is None and not there:
            return None
        index = there[-1] if index is None else index
        if index not in there:
            raise ValueError(
                f"{folder} has no round {index}; it has "
                f"{', '.join(map(str, there)) or 'none'}."
            )
        try:
            read = _read(rounds, index, leaves, named_leaves(params))
        except Exception as error:  # Storage and formats fail in many ways.
            raise ValueError(
                f"Round {index} of {folder} cannot be restored: {error}"
            ) from error
    return Round(
        index,
        tree_at(params, read["masks"]),
        tree_at(state, read["state"]),
        tree_at(state, read["snapshot"]),
    )


def _rounds(folder: str | os.PathLike) -> ocp.training.Checkpointer:
    """Return the checkpoints of a folder, all of which stay."""
    folder = os.fspath(folder)
    return ocp.training.Checkpointer(
        folder if "://" in folder else os.path.abspath(folder)
    )


def _indices(rounds: ocp.training.Checkpointer) -> list[int]:
    return sorted(info.step for info in rounds.checkpoints)


def _read(
    rounds: ocp.training.Checkpointer,
    index: int,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    weights: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, Any]:
    about: Any = rounds.checkpointables_metadata(index).custom_metadata
    if not isinstance(about, dict) or about.get("kind") != _KIND:
        raise ValueError("save_round did not write it.")
    as_mask = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bool_, sharding=x.sharding)
    masks = {p: as_mask(x) for p, x in weights.items() if p in about["masks"]}
    parts = {"masks": masks, "state": leaves, "snapshot": leaves}
    for name, arrays in parts.items():
        _check_same(name, about[name], _described(arrays))
    return rounds.load_checkpointables(index, parts)


def _array(x: Any) -> jax.Array:
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    """Return shape, dtype and sharding; on the default device unless it has one."""
    sharding = getattr(x, "sharding", None) or jnp.zeros(()).sharding
    like = jax.eval_shape(_array, x)
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)


def _described(leaves: Mapping[str, Any]) -> dict[str, str]:
    return {path: f"{x.dtype}{list(x.shape)}" for path, x in leaves.items()}


def _check_same(part: str, there: Mapping[str, str], here: Mapping[str, str]) -> None:
    if differing := first_difference(there, here):
        name, theirs, ours = differing
        raise ValueError(
            f"it is of another state, or another params_of=: {name} of its {part} is "
            f"{theirs}, and {ours} in state=."
        )
