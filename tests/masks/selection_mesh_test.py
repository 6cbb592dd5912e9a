import contextlib
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax.masks import selection


def nested(jaxpr):
    """Yield the equations of a jaxpr and of all that are in them."""
    for equation in jaxpr.eqns:
        yield equation
        inner = jax.tree.leaves(list(equation.params.values()))
        for parameter in [getattr(p, "jaxpr", p) for p in inner]:
            if hasattr(parameter, "eqns"):
                yield from nested(parameter)


FORBIDDEN = {"sort", "top_k", "gather", "scatter", "all_gather", "all_to_all"}


@pytest.mark.parametrize(
    "select",
    [
        selection.top_k_mask,
        functools.partial(selection.top_k_mask, axis=0),
        selection.kth_largest,
        lambda x, k: selection.global_top_k_mask({"a": x, "b": x}, k, where=None),
    ],
    ids=["top_k_mask", "axis", "kth_largest", "global_top_k_mask"],
)
def test_nothing_is_sorted_or_gathered_or_sent_to_the_host(select):
    jaxpr = jax.make_jaxpr(select)(jnp.ones((5, 12)), jnp.int32(3)).jaxpr
    names = {equation.primitive.name for equation in nested(jaxpr)}
    assert {"while", "reduce"} <= names
    assert not {n for n in names if n in FORBIDDEN or "scatter" in n or "call" in n}


# Meshes

SHARDED = (64, 48)
SPECS = [
    ((8,), P("x")),
    ((8,), P(None, "x")),
    ((4, 2), P("x", "y")),
    ((4, 2), P(("x", "y"))),
    ((2, 4), P()),
]
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESHES = [
    *((*spec, AUTO, False) for spec in SPECS),
    *((*spec, EXPLICIT, True) for spec in SPECS),
    (*SPECS[2], AUTO, True),
    (*SPECS[1], EXPLICIT, False),
    (*SPECS[2], EXPLICIT, False),
]


@functools.cache
def sharded_scores():
    """Return scores with ties that lie on different devices."""
    values = np.random.default_rng(3).normal(size=SHARDED).round(1)
    values[values < -1.5] = np.nan
    return values.astype(np.float32)


def put(value, shape, spec, kind):
    names = ("x", "y")[: len(shape)]
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))
    return jax.device_put(value, NamedSharding(mesh, spec))


@jax.jit
def select_all_ways(values, k, k_of_slices):
    masks = (
        selection.top_k_mask(values, k),
        selection.top_k_mask(values, k_of_slices, axis=0),
        selection.top_k_mask(values, 40, axis=-1, where=values > 0),
    )
    return masks, selection.kth_largest(values, k)


@pytest.mark.parametrize(("shape", "spec", "kind", "within"), MESHES, ids=str)
def test_selections_are_the_same_on_every_mesh(shape, spec, kind, within):
    values, slices = sharded_scores(), np.arange(48)
    sharded = put(values, shape, spec, kind)
    context = (
        jax.set_mesh(sharded.sharding.mesh) if within else contextlib.nullcontext()
    )
    with context:
        masks, value = select_all_ways(sharded, 500, slices)
    expected = (
        oracles.top_k(values, 500),
        oracles.top_k(values, slices, 0),
        oracles.top_k(values, 40, -1, values > 0),
    )
    for mask, right in zip(masks, expected, strict=True):
        np.testing.assert_array_equal(mask, right)
        assert mask.sharding.is_equivalent_to(sharded.sharding, 2)
    assert float(value) == oracles.kth_largest(values, 500)


def test_eager_selections_are_sharded_as_the_scores_are():
    sharded = put(sharded_scores(), (4, 2), P("x", "y"), AUTO)
    mask = selection.top_k_mask(sharded, 500)
    np.testing.assert_array_equal(mask, oracles.top_k(sharded_scores(), 500))
    assert mask.sharding.is_equivalent_to(sharded.sharding, 2)


def test_leaves_of_a_tree_compete_across_devices():
    halves = {"a": sharded_scores()[:32], "b": sharded_scores()[32:]}
    tree = {
        "a": put(halves["a"], (4, 2), P("x", "y"), AUTO),
        "b": put(halves["b"], (4, 2), P("y"), AUTO),
    }
    result = jax.jit(selection.global_top_k_mask)(tree, 500)
    for name, expected in oracles.top_k_tree(halves, 500).items():
        np.testing.assert_array_equal(result[name], expected)
        assert result[name].sharding.is_equivalent_to(tree[name].sharding, 2)


COLLECTIVE = re.compile(
    r"= (.*?) (?:all-gather|all-reduce|all-to-all|reduce-scatter|"
    r"collective-permute|collective-broadcast)(?:-start)?\("
)
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
ELSEWHERE = re.compile(r"(?<![-\w])(sort|gather|scatter|custom-call|infeed|outfeed)\(")


@pytest.mark.parametrize(
    ("axis", "slices"), [(None, 1), (0, 48), (1, 64)], ids=["whole", "columns", "rows"]
)
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=lambda k: k.name)
def test_only_counts_travel(kind, axis, slices):
    sharded = put(sharded_scores(), (4, 2), P("x", "y"), kind)
    with jax.set_mesh(sharded.sharding.mesh):
        select = jax.jit(functools.partial(selection.top_k_mask, axis=axis))
        hlo = select.lower(sharded, 9).compile().as_text()
    moved = [a for arrays in COLLECTIVE.findall(hlo) for a in ARRAY.findall(arrays)]
    assert moved
    for dtype, shape in moved:
        assert dtype in ("s32", "pred")
        elements = math.prod(int(n) for n in shape.split(",") if n)
        assert elements <= 8 * slices < sharded.size
    assert not ELSEWHERE.findall(hlo)


def test_a_device_of_a_shard_map_selects_in_its_own_shard():
    values = sharded_scores()
    sharded = put(values, (4, 2), P("x", "y"), AUTO)
    k = np.arange(8, dtype=np.int32).reshape(4, 2) * 20

    def local(values, k):
        k = k.reshape(())
        return selection.top_k_mask(values, k), selection.kth_largest(values, k)[None]

    select = jax.shard_map(
        local,
        mesh=sharded.sharding.mesh,
        in_specs=P("x", "y"),
        out_specs=(P("x", "y"), P(("x", "y"))),
    )
    mask, value = jax.jit(select)(sharded, k)
    for i, j in itertools.product(range(4), range(2)):
        shard = np.s_[16 * i : 16 * (i + 1), 24 * j : 24 * (j + 1)]
        expected = oracles.top_k(values[shard], k[i, j])
        np.testing.assert_array_equal(mask[shard], expected)
        if k[i, j]:
            kth = oracles.kth_largest(values[shard], int(k[i, j]))
            assert value[2 * i + j] == kth
    assert np.isnan(value[0])


def test_devices_of_a_pmap_select_for_themselves():
    values = sharded_scores().reshape(8, 8, 48)
    k = np.arange(8, dtype=np.int32) * 30
    mask = jax.pmap(selection.top_k_mask)(values, k)
    for i in range(8):
        np.testing.assert_array_equal(mask[i], oracles.top_k(values[i], k[i]))
