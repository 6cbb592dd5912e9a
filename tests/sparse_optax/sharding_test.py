"""On sharded weights nothing but counts travels, and no device holds a whole leaf."""

import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from contract_cases import ALGORITHMS, marks
from jax import P
from jax.sharding import AxisType, NamedSharding

from sparsejax import sparse_optax
from sparsejax.masks import Layout

# Of many weights a neuron: what a search holds for each neuron counts little.
LEAVES = {
    "conv": ((3, 3, 128, 64), P(None, None, "y", "x")),
    "fc": ((1024, 80), P(("x", "y"))),
    "out": ((320, 256), P("x", "y")),
    "stack": ((4, 256, 72), P("x", None, "y")),
}
SMALLEST = min(math.prod(shape) for shape, _ in LEAVES.values())
COLLECTIVE = re.compile(
    r"= (\S.*?) ((?:all-gather|all-to-all|ragged-all-to-all|collective-permute"
    r"|collective-broadcast|all-reduce|reduce-scatter)(?:-start)?)\("
)
ARRAY = re.compile(r"[a-z]+[0-9]*\[([0-9,]*)\]")


def make_mesh(kind):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


def abstract_params(mesh):
    return {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, spec)
        )
        for name, (shape, spec) in LEAVES.items()
    }


def with_shardings(tree, mesh):
    """Shard what has the shape of a parameter as it, and replicate all else."""
    specs = {shape: spec for shape, spec in LEAVES.values()}

    def leaf(x):
        sharding = NamedSharding(mesh, specs.get(x.shape, P()))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, tree)


def collectives(compiled):
    """Return every collective and the number of elements that it leaves a device."""
    found = []
    for result, name in COLLECTIVE.findall(compiled.as_text()):
        shapes = [re.findall("[0-9]+", dims) for dims in ARRAY.findall(result)]
        found.append((name, sum(math.prod(map(int, dims)) for dims in shapes)))
    return found


def check(compiled):
    for name, elements in collectives(compiled):
        assert elements < SMALLEST / 16, f"{name} of {elements} elements"
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < SMALLEST * jnp.float32.dtype.itemsize / 2


def same(found, asked):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(asked), strict=True)
    return all(x.is_equivalent_to(y.sharding, y.ndim) for x, y in pairs)


@pytest.mark.parametrize(
    ("algorithm", "kind"),
    [(name, AxisType.Auto) for name in ALGORITHMS]
    + [pytest.param(name, AxisType.Explicit, marks=marks(name)) for name in ALGORITHMS],
)
def test_only_counts_travel(algorithm, kind):
    algorithm, mesh = ALGORITHMS[algorithm], make_mesh(kind)
    layout = {"stack": Layout(batch=(0,))}
    tx = algorithm.build(optax.sgd(0.1, momentum=0.9), layout=layout)
    with jax.set_mesh(mesh):
        params = abstract_params(mesh)
        state = with_shardings(jax.eval_shape(tx.init, params), mesh)
        # What XLA makes from no value of a sharded array has no sharding to follow.
        shardings = jax.tree.map(lambda x: x.sharding, state)
        asked = shardings if kind == AxisType.Auto else None
        init = jax.jit(tx.init, out_shardings=asked).lower(params).compile()
        update = jax.jit(tx.update).lower(params, state, params).compile()
    check(init)
    check(update)
    assert bool(collectives(update)) == bool(algorithm.events)
    assert same(init.output_shardings, state)
    masks = lambda state: sparse_optax.get_masks(state)
    assert same(masks(update.output_shardings[1]), masks(state))


def test_what_gathers_would_be_found():
    mesh = make_mesh(AxisType.Auto)
    weight = abstract_params(mesh)["fc"]
    whole = NamedSharding(mesh, P())
    for gathers in (
        jax.jit(lambda x: x + 1, out_shardings=whole),
        jax.jit(lambda x: jnp.sort(x, axis=0), out_shardings=weight.sharding),
    ):
        with pytest.raises(AssertionError, match="all-"):
            check(gathers.lower(weight).compile())
