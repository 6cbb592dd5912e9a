"""Plans written by hand, and the masked trees they belong to."""

import jax
import numpy as np
from flax import nnx

from sparsejax.compaction.plan import Plan
from sparsejax.masks.layout import named_leaves


def plan_for(tree, removed, **rest):
    """A plan that removes indices, given by path and axis, from a tree or a module."""
    tree = nnx.state(tree) if isinstance(tree, nnx.Module) else tree
    leaves = named_leaves(tree)
    assert set(removed) <= set(leaves), sorted(leaves)

    def keep(path, leaf):
        gone = removed.get(path, {})
        return tuple(
            np.setdiff1d(np.arange(n), gone[axis]) if axis in gone else None
            for axis, n in enumerate(leaf.shape)
        )

    return Plan({path: keep(path, leaf) for path, leaf in leaves.items()}, **rest)


def masked(tree, removed):
    """The tree, or the module, with zeros for all that is to be removed."""
    if isinstance(tree, nnx.Module):
        graphdef, state = nnx.split(tree)
        return nnx.merge(graphdef, masked(state, removed))
    leaves = named_leaves(tree)
    for path, axes in removed.items():
        array = np.array(leaves[path])
        for axis, gone in axes.items():
            np.moveaxis(array, axis, 0)[gone] = 0
        leaves[path] = jax.numpy.asarray(array)
    return jax.tree.structure(tree).unflatten(leaves.values())


def drawn(make, seed=0):
    """The module ``make(rngs)``, with random numbers and without its own start."""
    return randomised(nnx.eval_shape(lambda: make(nnx.Rngs(0))), seed)


def leaves_of(make):
    """The shapes of the parameters of ``make(rngs)`` by path."""
    return named_leaves(nnx.state(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param))


def randomised(tree, seed=0):
    """The tree, or the module, abstract or not, with random numbers for its leaves."""
    if isinstance(tree, nnx.Module):
        graphdef, state = nnx.split(tree)
        return nnx.merge(graphdef, randomised(state, seed))
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(seed)
        if not jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
            return jax.numpy.zeros(leaf.shape, leaf.dtype)
        return jax.numpy.asarray(rng.uniform(0.3, 1.0, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, tree)
