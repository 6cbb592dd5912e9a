"""Attention with fewer heads, or with heads of fewer features."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import plans
import pytest
from flax import nnx
from rebuilds import Scanned, assert_close, inputs, layer, rebuilt, without

from sparsejax.compaction import CompactionError
from sparsejax.compaction.exact_attention import AtFullDepth, at_full_depth
from sparsejax.compaction.layers import equal_sizes
from sparsejax.compaction.rebuild import rebuild

attention = functools.partial(
    layer, nnx.MultiHeadAttention, 4, 6, 32, in_kv_features=5, decode=False
)


def heads_removed(gone, kv_gone=None):
    kv_gone = gone if kv_gone is None else kv_gone
    removed = {"out/kernel": {0: gone}}
    for name, which in {"query": gone, "key": kv_gone, "value": kv_gone}.items():
        removed |= {f"{name}/kernel": {1: which}, f"{name}/bias": {0: which}}
    return removed


def depth_removed(query_gone, value_gone):
    removed = {"out/kernel": {1: value_gone}}
    for name, gone in {
        "query": query_gone,
        "key": query_gone,
        "value": value_gone,
    }.items():
        removed |= {f"{name}/kernel": {2: gone}, f"{name}/bias": {1: gone}}
    return removed


def of_inputs(removed):
    """Also without some input and output features."""
    more = {"query/kernel": {0: [5]}, "key/kernel": {0: [0]}, "value/kernel": {0: [0]}}
    more |= {"out/kernel": {2: [1]}, "out/bias": {0: [1]}}
    return {path: removed.get(path, {}) | more.get(path, {}) for path in removed | more}


def attended(module, is_small, **options):
    x, y = inputs(2, 7, 6), inputs(2, 3, 5)
    if is_small:
        return module(without(x, [5]), without(y, [0]), **options)
    return without(module(x, y, **options), [1])


@pytest.mark.parametrize(
    ("make", "removed", "left"),
    [
        (attention(), heads_removed([1, 2]), (2, 2, 8)),
        (attention(num_kv_heads=2), heads_removed([2, 3], [1]), (2, 1, 8)),
        (attention(num_kv_heads=2), heads_removed([1, 2], []), (2, 2, 8)),
        (attention(), depth_removed([0, 3], [5, 7]), (4, 4, 6)),
        (attention(dtype=jnp.bfloat16), depth_removed([0, 3], [5, 7]), (4, 4, 6)),
        (attention(), depth_removed([*range(8)], [*range(8)]), (4, 4, 0)),
        (attention(), heads_removed([0, 1, 2, 3]), (0, 0, 8)),
    ],
)
def test_smaller_attention_attends_as_it_did(make, removed, left):
    full, small = rebuilt(make, of_inputs(removed))
    found, expected = attended(small, True), attended(full, False)
    assert found.dtype == expected.dtype
    tolerance = 2e-2 if found.dtype == jnp.bfloat16 else 2e-6
    found, expected = (x.astype(jnp.float32) for x in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    assert (small.num_heads, small.num_kv_heads, small.head_dim) == left
    sizes = (small.in_features, small.in_kv_features, small.out_features)
    assert (*sizes, small.qkv_features) == (5, 4, 5, left[0] * left[2])


def by_distance(query, key, value, *, mask=None, **_):
    """Attention to what is near: of the size of heads it uses something else."""
    squares = jnp.square(query[:, :, None] - key[:, None]).mean(-1)
    return jnp.einsum("nqkh,nkhd->nqhd", jax.nn.softmax(-squares, 2), value)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (attention(attention_fn=by_distance), {}),
        (attention(dropout_rate=0.5), {"deterministic": True}),
        (attention(dropout_rate=0.5), {"deterministic": False}),
        (attention(), {"mask": jnp.tri(7, 3, dtype=bool)[None, None]}),
        (attention(), {"is_causal": True}),
    ],
)
def test_attention_of_every_kind_keeps_its_scale(make, options):
    full, small = rebuilt(make, of_inputs(depth_removed([0, 3], [5, 7])))
    random = lambda: nnx.Rngs(dropout=3)
    expected = attended(full, False, rngs=random(), **options)
    assert_close(attended(small, True, rngs=random(), **options), expected)


def test_attention_with_normalised_queries_keeps_both_constants():
    removed = depth_removed([0, 3], [5, 7])
    removed |= {"query_ln/scale": {0: [0, 3]}, "key_ln/scale": {0: [0, 3]}}
    full, small = rebuilt(attention(normalize_qk=True), of_inputs(removed))
    assert_close(attended(small, True), attended(full, False))
    assert small.query_ln.full_features == 8


def test_attention_compacted_twice_keeps_the_first_scale():
    full = plans.masked(plans.drawn(attention()), depth_removed([0, 3], [5, 7]))
    once = rebuild(full, plans.plan_for(full, depth_removed([0], [5])))
    # What was 3 is 2 now, and 7 is 6.
    twice = rebuild(once, plans.plan_for(once, depth_removed([2], [6])))
    x, y = inputs(2, 7, 6), inputs(2, 3, 5)
    assert_close(twice(x, y), full(x, y))
    assert twice.attention_fn == AtFullDepth(nnx.dot_product_attention, 8)


def test_attention_at_full_depth_is_a_static_attribute():
    _, small = rebuilt(attention(), depth_removed([0], [5]))
    x, y = inputs(2, 7, 6), inputs(2, 3, 5)
    traces = []

    @jax.jit
    def apply(module, x, y):
        traces.append(module)
        return module(x, y)

    graphdef, state = nnx.split(small)
    for module in (small, nnx.clone(small), nnx.merge(graphdef, state)):
        assert_close(apply(module, x, y), small(x, y))
    assert len(traces) == 1
    assert at_full_depth(small.attention_fn, 3) == small.attention_fn


@pytest.mark.parametrize(
    ("removed", "reason"),
    [
        (depth_removed([0], []), "7 dimensions are left of query and key and 8 of"),
        (heads_removed([0], []), "3 heads that are left must be a multiple of the 4"),
        (heads_removed([], [0, 1, 2, 3]), "multiple of the 0 heads"),
    ],
)
def test_attention_that_cannot_be_built_is_refused(removed, reason):
    make = lambda rngs: nnx.Dict(attend=attention()(rngs))
    removed = {f"attend/{path}": axes for path, axes in removed.items()}
    with pytest.raises(CompactionError, match=f"^attend: .*{reason}"):
        rebuilt(make, removed)


def test_sizes_of_heads_that_must_stay_equal_are_listed():
    def make(rngs):
        layers = [attention()(rngs), nnx.Linear(2, 2, rngs=rngs)]
        return nnx.Dict(layers=nnx.List(layers), stack=Scanned(attention(), rngs))

    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    names = [("query", 2), ("key", 2), ("value", 2), ("out", 1)]
    assert equal_sizes(model) == [
        tuple((f"layers/0/{name}/kernel", axis) for name, axis in names),
        tuple((f"stack/blocks/{name}/kernel", axis + 1) for name, axis in names),
    ]
