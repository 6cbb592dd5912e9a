"""A model and its optimizer, apart from their arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from configs import base
from experiments import build, data
from sparsejax import sparse_optax

# The arrays of the modules: {"model": ..., "optimizer": ...}.
State = Any


class Training(NamedTuple):
    """A model and its optimizer, apart from their arrays.

    Attributes:
      graphdef: of the modules; `nnx.merge(graphdef, state)` makes them.
      abstract: shapes, dtypes and shardings of a state.
      init: makes the state before the first step.
      is_sparse: whether the optimizer holds masks.
    """

    graphdef: nnx.GraphDef
    abstract: State
    init: Callable[[], State]
    is_sparse: bool

    def masks(self, state: State) -> Any:
        """Return the masks in a state, as a tree like the parameters.

        A leaf that is dense has None; where all are, that is the whole result.
        """
        if not self.is_sparse:
            return None
        optimizer = nnx.merge(self.graphdef, state)["optimizer"]
        return sparse_optax.get_masks(optimizer.opt_state)


def prepare(
    config: base.Config, dataset: data.Dataset, sharding: jax.sharding.Sharding
) -> Training:
    """Define the model and the optimizer of a config, without making an array.

    Args:
      config: the run.
      dataset: for the sizes of the model's input and output.
      sharding: of every array of a state.
    """
    weights_key, masks_key = jax.random.split(jax.random.key(config.seed))
    tx = build.optimizer(config, key=masks_key)
    is_sparse = config.sparse.method != "dense"

    def create() -> dict[str, nnx.Pytree]:
        model = build.model(config.model, dataset, key=weights_key)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        if is_sparse:
            params = nnx.state(model, nnx.Param)
            nnx.update(model, sparse_optax.apply_masks(params, optimizer.opt_state))
        return {"model": model, "optimizer": optimizer}

    def init() -> State:
        return nnx.as_pure(nnx.split(create())[1])

    graphdef, abstract = nnx.split(nnx.eval_shape(create))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        nnx.as_pure(abstract),
    )
    init = jax.jit(init, out_shardings=sharding)
    return Training(graphdef, abstract, init, is_sparse)
