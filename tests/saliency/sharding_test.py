"""Masks of weights that are sharded over a mesh are those of the whole weights."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

from sparsejax import saliency

SPECS = {"a": P(None, "x"), "b": P("x")}


def apply(params, x):
    # Gathered for the matrix product, as explicit axes must be told.
    if jax.typeof(params["a"]).sharding.mesh.explicit_axes:
        params = {name: jax.sharding.reshard(w, P()) for name, w in params.items()}
    return jax.nn.relu(x @ params["a"]) @ params["b"]


def loss(params, x):
    return (apply(params, x) ** 2).mean()


METHODS = {
    "magnitude": lambda params: saliency.magnitude(params, sparsity=0.8),
    "grasp": lambda params: saliency.grasp(loss, params, [jnp.eye(3, 5)], sparsity=0.8),
    "synflow": lambda params: saliency.synflow(
        apply, params, (1, 5), sparsity=0.8, rounds=3
    ),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", METHODS)
def test_masks_do_not_depend_on_the_mesh(name, kind):
    rng = np.random.default_rng(0)
    shapes = {"a": (5, 16), "b": (16, 3)}
    params = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    whole = METHODS[name](params)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        shardings = {n: NamedSharding(mesh, spec) for n, spec in SPECS.items()}
        sharded = METHODS[name](jax.device_put(params, shardings))
    chex.assert_trees_all_equal(jax.device_get(sharded), jax.device_get(whole))
    if name == "magnitude":
        for mask, sharding in zip(
            jax.tree.leaves(sharded), jax.tree.leaves(shardings), strict=True
        ):
            assert mask.sharding.is_equivalent_to(sharding, mask.ndim)
