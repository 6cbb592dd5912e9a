import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

from sparsejax.compaction.state import changed_state


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.linear(x)))


class Stack(nnx.Module):
    """Three blocks in one scan, their weights stacked."""

    def __init__(self, wrap, rngs):
        self.blocks = nnx.vmap(Block)(rngs.split(3))
        self.wrap = wrap

    def __call__(self, x):
        step = self.wrap(lambda x, block: block(x))
        scan = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scan(x, self.blocks)


class Pair(nnx.Module):
    """Two variables, which `update` makes anew from what they were."""

    def __init__(self, update):
        self.a = nnx.Variable(jnp.ones(2))
        self.b = nnx.Variable(jnp.zeros(2))
        self.update = update

    def __call__(self, x):
        a, b = self.update(self.a[...], self.b[...])
        self.a.set_value(a)
        self.b.set_value(b)
        return x


@pytest.mark.parametrize(
    ("build", "where"),
    [
        (Block, ""),
        (lambda rngs: Stack(lambda f: f, rngs), "blocks/"),
        (lambda rngs: Stack(nnx.remat, rngs), "blocks/"),
        (lambda rngs: Stack(nnx.jit, rngs), "blocks/"),
    ],
)
def test_training_changes_statistics_and_counters(build, where):
    model = build(nnx.Rngs(0))
    x = jax.ShapeDtypeStruct((4, 2), jnp.float32)
    changed = changed_state(model, (x,))
    names = ("drop/rngs/count", "norm/mean", "norm/var")
    assert changed == [f"{where}{name}" for name in names]
    model.eval()
    assert changed_state(model, (x,)) == []


def scanned(step):
    return lambda a, b: lax.scan(lambda c, _: (step(*c), None), (a, b), length=2)[0]


@pytest.mark.parametrize(
    ("update", "changed"),
    [
        (lambda a, b: (a, b), ""),
        (lambda a, b: (b, a), "ab"),
        (lambda a, b: (a + 0, b), "a"),
        (lambda a, b: (jnp.ones(2), b), "a"),
        (jax.jit(lambda a, b: (a, b)), ""),
        (jax.jit(lambda a, b: (b, b)), "a"),
        (jax.jit(lambda a, b: (jax.jit(lambda x: x)(a), 2 * b)), "b"),
        (jax.checkpoint(lambda a, b: (a, jnp.sin(b))), "b"),
        (scanned(lambda a, b: (a, b)), ""),
        (scanned(lambda a, b: (a, b + 1)), "b"),
        # After an even number of swaps both are what they were; it is not followed.
        (scanned(lambda a, b: (b, a)), "ab"),
        (lambda a, b: scanned(lambda a, b: (b, a))(a, b)[::-1], "ab"),
        (lambda a, b: (lax.scan(lambda c, _: (b, None), a, length=2)[0], b), "a"),
        (lambda a, b: (lax.scan(lambda c, _: (c, a), 0, length=2)[1], b), "a"),
        (lambda a, b: (lax.scan(lambda c, x: (c, x), 0, a)[1], b), ""),
        (lambda a, b: (lax.scan(lambda c, x: (c, -x), 0, a)[1], b), "a"),
    ],
)
def test_a_variable_is_followed_through_calls(update, changed):
    assert changed_state(Pair(update), (jnp.zeros(1),)) == list(changed)
