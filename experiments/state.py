"""A model and its optimizer, apart from their arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, Sharding

from configs import base
from experiments import build, data
from experiments.mesh import sharding
from sparsejax import sparse_optax

# The arrays of the modules: {"model": ..., "optimizer": ...}, and "average", a second
# model, where `config.ema_decay` asks for it.
State = Any


class Training(NamedTuple):
    """A model and its optimizer, apart from their arrays.

    Attributes:
      config: of the run.
      graphdef: of the modules; `nnx.merge(graphdef, state)` makes them.
      abstract: shapes, dtypes and shardings of a state.
      init: makes the state before the first step.
      is_sparse: whether the optimizer holds masks.
    """

    config: base.Config
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

    def tested(self, state: State) -> nnx.Module:
        """Return the model to use, the average if there is one, in evaluation mode."""
        modules = nnx.merge(self.graphdef, state)
        model = modules.get("average", modules["model"])
        model.eval()
        return model


def prepare(
    config: base.Config,
    dataset: data.Dataset,
    devices: Mesh | AbstractMesh | Sharding,
) -> Training:
    """Define the model and the optimizer of a config, without making an array.

    Args:
      config: the run.
      dataset: for the sizes of the model's input and output.
      devices: a mesh, over which `experiments.mesh` spreads the state, or the sharding
        of every array of it.
    """
    weights_key, masks_key = jax.random.split(jax.random.key(config.seed))
    groups = build.channel_groups(config, dataset)
    tx = build.optimizer(config, key=masks_key, groups=groups)
    is_sparse = config.sparse.method != "dense"

    def create() -> dict[str, Any]:
        model = build.model(config.model, dataset, key=weights_key)
        build.compute_in(model, config.dtype)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        if is_sparse and config.sparse.initial == "dense":
            mask(model, optimizer)
        elif is_sparse:
            redraw(model, optimizer, config.sparse.initial, weights_key)
        modules = {"model": model, "optimizer": optimizer}
        return modules | ({"average": nnx.clone(model)} if config.ema_decay else {})

    def init() -> State:
        return nnx.as_pure(nnx.split(create())[1])

    def place(x: Any) -> jax.ShapeDtypeStruct:
        own = devices if isinstance(devices, Sharding) else sharding(devices, x.shape)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own)

    graphdef, abstract = nnx.split(nnx.eval_shape(create))
    abstract = jax.tree.map(place, nnx.as_pure(abstract))
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    init = jax.jit(init, out_shardings=shardings)
    return Training(config, graphdef, abstract, init, is_sparse)


def mask(model: nnx.Module, optimizer: nnx.Optimizer) -> None:
    """Set the weights of a model to 0, in place, that the optimizer masks."""
    params = nnx.state(model, nnx.Param)
    nnx.update(model, sparse_optax.apply_masks(params, optimizer.opt_state))


def redraw(
    model: nnx.Module, optimizer: nnx.Optimizer, variant: Any, key: jax.Array
) -> None:
    """Draw the active weights of a model anew, in place, each for its own fan-in."""
    params = sparse_optax.reinitialize(
        nnx.state(model, nnx.Param),
        optimizer.opt_state,
        key=jax.random.fold_in(key, 1),
        variant=variant,
    )
    nnx.update(model, params)
