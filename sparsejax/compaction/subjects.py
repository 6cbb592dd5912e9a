"""A model as a function of named arrays: modules, callable pytrees, functions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from sparsejax.compaction.errors import CompactionError
from sparsejax.compaction.state import changed_state
from sparsejax.masks.layout import named_leaves


@dataclasses.dataclass(frozen=True)
class Subject:
    """A function of named arrays and of inputs.

    Attributes:
      fn: ``fn(arrays, *inputs)``, arrays by path.
      arrays: the parameters by path.
      assemble: makes a model, or a tree, of arrays by path.
    """

    fn: Callable[..., Any]
    arrays: dict[str, Any]
    assemble: Callable[[Mapping[str, Any]], Any]


def of_model(model: Any) -> Subject:
    """Return an NNX module or another callable pytree as a function of its arrays.

    Raises:
      TypeError: the model cannot be called.
    """
    if isinstance(model, nnx.Module):
        return _of_module(model)
    if not callable(model) or jax.tree_util.all_leaves([model]):
        raise TypeError(
            "A model is an nnx.Module or a callable pytree that holds its arrays, got "
            f"{model!r}. A function needs its parameters beside it: params=..."
        )
    return of_tree(lambda tree, *inputs: tree(*inputs), model)


def of_tree(fn: Callable[..., Any], params: Any) -> Subject:
    """Return ``fn(params, *inputs)`` as a function of the arrays in ``params``.

    Other leaves, as activation functions of Equinox modules and random keys, stay.
    """
    assemble, arrays = _separated(params)
    return Subject(
        lambda arrays, *inputs: fn(assemble(arrays), *inputs), arrays, assemble
    )


def _of_module(model: nnx.Module) -> Subject:
    graphdef, random, state = nnx.split(model, nnx.RngState, ...)
    assemble_state, arrays = _separated(state)

    def assemble(arrays: Mapping[str, Any]) -> Any:
        # Copied, so that all variables belong to one trace, the random ones too.
        return nnx.merge(graphdef, random, assemble_state(arrays), copy=True)

    return Subject(lambda arrays, *inputs: assemble(arrays)(*inputs), arrays, assemble)


def _separated(
    tree: Any,
) -> tuple[Callable[[Mapping[str, Any]], Any], dict[str, Any]]:
    leaves = named_leaves(tree)
    unflatten = jax.tree.structure(tree).unflatten
    arrays = {path: leaf for path, leaf in leaves.items() if is_array(leaf)}
    return lambda others: unflatten({**leaves, **others}.values()), arrays


def is_array(leaf: Any) -> bool:
    """Say whether a leaf is an array of numbers, real or abstract; keys are not."""
    arrays = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
    return isinstance(leaf, arrays) and isinstance(leaf.dtype, np.dtype)


def check_unchanged(model: Any, inputs: tuple[Any, ...]) -> None:
    """Refuse a module that changes when it is called.

    Raises:
      CompactionError: names what changes, as BatchNorm's statistics in training.
    """
    changed = changed_state(model, inputs) if isinstance(model, nnx.Module) else []
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise CompactionError(
            "A model must not change when it is called, and this one changes "
            f"{', '.join(changed[:3])}{more}. Call model.eval() first."
        )
