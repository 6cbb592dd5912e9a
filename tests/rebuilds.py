"""Layers with fewer channels beside their masked originals, and what they are fed."""

import jax.numpy as jnp
import numpy as np
import plans
from flax import nnx

from sparsejax.compaction.rebuild import rebuild


def rebuilt(make, removed, **rest):
    """The masked model with random parameters, and the small one."""
    full = plans.masked(plans.drawn(make), removed)
    return full, rebuild(full, plans.plan_for(full, removed, **rest))


def inputs(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def without(x, gone, axis=-1):
    return jnp.asarray(np.delete(np.asarray(x), gone, axis))


def assert_close(found, expected):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def layer(cls, *arguments, **options):
    return lambda rngs: cls(*arguments, rngs=rngs, **options)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.up = nnx.Linear(6, 8, rngs=rngs)
        self.down = nnx.LinearGeneral((8,), (6,), axis=(-1,), rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(self.norm(x))))


class Scanned(nnx.Module):
    def __init__(self, make, rngs):
        self.blocks = nnx.vmap(make)(rngs.split(3))

    def __call__(self, x):
        step = lambda x, block: (block(x), None)
        axes = (nnx.Carry, 0)
        return nnx.scan(step, in_axes=axes, out_axes=axes)(x, self.blocks)[0]
