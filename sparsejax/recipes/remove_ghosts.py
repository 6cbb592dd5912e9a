"""Take the ghosts out again: of models, parameters, optimizers and their states."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from sparsejax.recipes import _ghosted
from sparsejax.recipes._ghosted import NAMES
from sparsejax.recipes.ghost_neuron import neurons_of

T = TypeVar("T")


def remove_ghosts(tree: T) -> T:
    """Return what is left of a model, an optimizer or a state without its ghosts.

    A model is the plain one again: of the same classes and the same tree, with the
    parameters and statistics that it has now. At intensity 0, as at the end of the
    fade, that changes no output. So is an optimizer's state: its slots, masks and
    budgets are those that it has for the plain parameters, and a checkpoint of both is
    one of the plain model.

    Args:
      tree: a model from `add_ghosts`; an ``nnx.Optimizer`` of one; or any tree with
        parameters in dicts or ``nnx.State``, as parameters themselves, gradients, and
        states of optax are.

    Returns:
      The same without ghosts; what was given stays as it is.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from sparsejax import models, recipes, sparse_optax
      >>> model = models.resnet_cifar(8, width=4, rngs=nnx.Rngs(0))
      >>> ghosted, _ = recipes.add_ghosts(model, jnp.ones((2, 8, 8, 3)))
      >>> tx = sparse_optax.static(optax.sgd(0.1, momentum=0.9), sparsity=0.9)
      >>> plain, state = recipes.remove_ghosts(
      ...     (ghosted, tx.init(nnx.state(ghosted, nnx.Param))))
      >>> nnx.graphdef(plain) == nnx.graphdef(model)
      True
      >>> expected = tx.init(nnx.state(model, nnx.Param))
      >>> jax.tree.structure(state) == jax.tree.structure(expected)
      True
    """
    if isinstance(tree, nnx.Optimizer):
        optimizer = nnx.clone(tree)
        optimizer.opt_state = nnx.data(remove_ghosts(tree.opt_state))
        return optimizer
    if isinstance(tree, nnx.Module):
        return _plain(tree)
    if isinstance(tree, Mapping):
        # Within a State mappings are dicts, and items() would show them as States.
        inside = tree.raw_mapping if isinstance(tree, nnx.State) else tree
        left = {k: remove_ghosts(v) for k, v in inside.items() if k not in NAMES}
        kept = {k: v for k, v in left.items() if not _is_emptied(inside[k], v)}
        make: Any = type(tree)
        return make(kept)
    children, treedef = jax.tree.flatten(tree, is_leaf=lambda x: x is not tree)
    if jax.tree_util.treedef_is_leaf(treedef):
        return tree
    return treedef.unflatten(map(remove_ghosts, children))


def is_ghost(path: str) -> bool:
    """Tell whether a path as ``"block/norm/ghost_skip/scale"`` is that of a ghost.

    Only a predicate ``where=`` of one's own can make a ghost sparse; combine it with
    this one.

    Args:
      path: names or numbers with slashes between them.

    Example:
      >>> from sparsejax import recipes, sparse_optax
      >>> where = lambda path, leaf: leaf.ndim >= 2 and not recipes.is_ghost(path)
      >>> tx = sparse_optax.rigl(sparsity=0.9, where=where)
    """
    return not NAMES.isdisjoint(path.split("/"))


def _is_emptied(before: Any, after: Any) -> bool:
    """Tell whether a mapping held ghosts and nothing else."""
    return isinstance(before, Mapping) and len(before) > 0 and not len(after)


def _plain(model: nnx.Module) -> Any:
    plain: Any = nnx.clone(model)
    for part in _ghosted.modules(plain).values():
        if _ghosted.is_changed(part):
            _ghosted.restore_class(part)
            for name in NAMES & vars(part).keys():
                delattr(part, name)
        for name, neuron in neurons_of(part).items():
            setattr(part, name, neuron.plain)
    return plain
