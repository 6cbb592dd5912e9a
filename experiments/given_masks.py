"""Training under masks that are given: one program serves all masks of a network."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from configs import base
from experiments import build
from experiments.state import State, Training
from sparsejax import sparse_optax


def optimizer_maker(config: base.Config) -> Callable[[nnx.Module, Any], nnx.Optimizer]:
    """Return a function from a model and its masks to a new optimizer under them.

    The optimizer is the config's; its `sparse` is not read.
    """
    dense = dataclasses.replace(config.sparse, method="dense")
    inner = build.optimizer(
        dataclasses.replace(config, sparse=dense), key=jax.random.key(0)
    )
    # What `static` updates does not depend on the masks that it starts with.
    shared = sparse_optax.static(inner, sparsity=0.0)

    def make(model: nnx.Module, masks: Any) -> nnx.Optimizer:
        tx = sparse_optax.static(inner, masks=masks)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        optimizer.tx = shared
        return optimizer

    return make


def training(
    config: base.Config,
    graphdef: nnx.GraphDef,
    state: State,
    device: jax.sharding.Sharding,
) -> Training:
    """Return what `make_train_step` compiles a step for.

    Args:
      config: the recipe.
      graphdef: of a model and its optimizer.
      state: their arrays, or their shapes.
      device: where they will be.
    """
    place = functools.partial(jax.ShapeDtypeStruct, sharding=device)
    abstract = jax.tree.map(lambda x: place(x.shape, x.dtype), state)
    return Training(config, graphdef, abstract, lambda: state, True)
