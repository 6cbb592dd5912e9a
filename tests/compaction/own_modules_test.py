"""Modules that users wrote, rebuilt smaller."""

import jax
import jax.numpy as jnp
import plans
import pytest
from flax import nnx
from rebuilds import assert_close, inputs, layer, rebuilt, without

from sparsejax import compaction
from sparsejax.compaction import CompactionError, register_compact


class Heads(nnx.Module):
    """Stores widths of its own, twice."""

    def __init__(self, heads, depth, *, rngs):
        self.heads, self.depth = heads, depth
        self.both = nnx.Linear(6, 2 * heads * depth, rngs=rngs)

    def __call__(self, x):
        x = self.both(x).reshape(*x.shape[:-1], 2, self.heads, self.depth)
        return jnp.prod(x, axis=-3).reshape(*x.shape[:-3], -1)


def one_head_fewer(cls):
    gone = [4, 5, 6, 7, 16, 17, 18, 19]  # head 1 of 3, of both halves
    removed = {"both/kernel": {1: gone}, "both/bias": {0: gone}}
    left = {("both/kernel", 1): (2, 2, 4)}
    return rebuilt(layer(cls, 3, 4), removed, factors=left)


def test_modules_that_are_not_known_stay_as_they_are():
    _, small = one_head_fewer(Heads)
    assert (small.heads, small.both.out_features) == (3, 16)


def test_a_registered_module_is_fixed_with_what_is_left():
    class Registered(Heads):
        pass

    class Child(Registered):
        pass

    seen = {}

    def fix(module, sliced):
        assert module is sliced.module and module.both.out_features == 16
        _, module.heads, module.depth = sliced.factors("both/kernel", -1)
        seen["full"] = sliced.full_shape("both/bias")
        seen["kept"] = sliced.kept("both/bias", 0).tolist()
        seen["all"] = sliced.kept("both/kernel", 0).tolist()
        seen["no factors"] = sliced.factors("both/kernel", 0)

    register_compact(Registered, fix)
    full, small = one_head_fewer(Child)
    x = inputs(2, 6)
    assert_close(small(x), without(full(x), [4, 5, 6, 7]))
    assert seen == {
        "full": (24,),
        "kept": [0, 1, 2, 3, *range(8, 16), *range(20, 24)],
        "all": [0, 1, 2, 3, 4, 5],
        "no factors": None,
    }


def test_a_module_with_a_method_for_it_fixes_itself():
    class Own(Heads):
        def __compact__(self):
            self.heads = self.both.out_features // (2 * self.depth)

    full, small = one_head_fewer(Own)
    x = inputs(2, 6)
    assert_close(small(x), without(full(x), [4, 5, 6, 7]))
    assert full.heads == 3


@pytest.mark.parametrize("given", [("Heads", len), (Heads, "fix")])
def test_only_classes_and_functions_are_registered(given):
    with pytest.raises(TypeError, match="a class and a function"):
        register_compact(*given)


class Fused(nnx.Module):
    """Attention as it is often written: one projection, reshaped by stored sizes."""

    def __init__(self, heads, depth, *, rngs):
        self.heads, self.depth = heads, depth
        self.qkv = nnx.Linear(6, 3 * heads * depth, rngs=rngs)
        self.out = nnx.Linear(heads * depth, 6, rngs=rngs)

    def __call__(self, x):
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, self.depth)
        query, key, value = jnp.moveaxis(qkv, 2, 0)
        y = jax.nn.dot_product_attention(query, key, value)
        return self.out(y.reshape(batch, length, -1))


def test_the_factors_of_a_real_plan_fix_a_fused_projection():
    full, x = plans.drawn(layer(Fused, 3, 4)), inputs(2, 5, 6)
    report = compaction.channel_groups(full, x)
    (heads,) = (g.name for g in report.groups if g.size == 3 and g.pinned is None)
    full = report.zero(full, {heads: [1]})
    with pytest.raises(CompactionError, match="register_compact"):
        compaction.compact(full, x)

    def fix(module, sliced):
        module.heads, module.depth = sliced.factors("out/kernel", 0)

    register_compact(Fused, fix)
    small, report = compaction.compact(full, x)
    assert (small.heads, small.depth, small.qkv.out_features) == (2, 4, 24)
    assert_close(small(x), full(x))
