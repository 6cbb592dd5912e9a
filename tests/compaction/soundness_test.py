"""What may be refused, kept with a reason, or lose channels: never may it be wrong.

A case is a function of the 16 hidden values of which half are masked.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compaction_probes import (
    ALIVE,
    CHANNELS,
    ORDER,
    WEIGHTS,
    assert_says_where,
    compacted,
    hidden_left,
    probe,
)
from jax import lax

from sparsejax import compaction


def plus_its_mirror(h):
    return h + h[:, ::-1]


def plus_the_next(h):
    return jnp.tanh(h + jnp.roll(h, 1, 1))


def mirrored_over_the_batch(h):
    return h + h.reshape(-1)[::-1].reshape(h.shape)


def channels_as_batch(h):
    return jnp.tanh(h.reshape(-1, 4) @ WEIGHTS.reshape(4, 4)).reshape(h.shape)


def pairs_multiplied(h):
    return h[:, 1::2] * h[:, ::2]


def every_other(h):
    return jnp.sin(h[:, ::2])


def one_replaced(h):
    return h.at[:, 2].set(1.0).at[:, 5].add(h[:, 0])


def window_replaced(h):
    return lax.dynamic_update_slice(h, jnp.cos(h[:, 5:9]), (0, 1))


def slice_from_a_constant(h):
    return lax.dynamic_slice_in_dim(h, jnp.int32(3), 9, 1)


def static_gather(h):
    return h[:, ORDER]


def static_scatter(h):
    index = jnp.arange(CHANNELS) * 3 % CHANNELS
    return jnp.zeros((h.shape[0], 20)).at[:, index].add(h)


def lower_triangle(h):
    return jnp.tril(h.reshape(-1, 4, 4)).reshape(h.shape)


def diagonal(h):
    return jnp.einsum("bii->bi", h.reshape(-1, 4, 4))


def trace(h):
    return h * jnp.trace(h.reshape(-1, 4, 4), axis1=1, axis2=2)[:, None]


def outer_product(h):
    return (h[:, :, None] * jnp.tanh(h)[:, None, :]).reshape(h.shape[0], -1)


def matrix_square(h):
    square = h.reshape(-1, 4, 4)
    return (square @ square).reshape(h.shape)


def largest_of_pairs(h):
    return h.reshape(-1, 8, 2).max(-1)


def shuffled_groups(h):
    return h.reshape(-1, 2, 8).swapaxes(1, 2).reshape(h.shape) * WEIGHTS[None]


def swapped_on_a_condition(h):
    return lax.cond(h[0, 0] > 0, lambda y: y, lambda y: y[:, ::-1], h)


def switched(h):
    branches = [jnp.sin, lambda y: y + 0.1, lambda y: jnp.roll(y, 1, 1)]
    return lax.switch((h[0, 4] > 0).astype(np.int32) + 1, branches, h)


def loop_of_traced_length(h):
    until = lambda state: (state[0] < 3) & (jnp.abs(state[1][0, 4]) < 9)
    return lax.while_loop(until, lambda s: (s[0] + 1, 1.5 * s[1]), (0, h))[1]


def rotating_carry(h):
    step = lambda carry, _: (jnp.roll(carry, 1, 1), carry[:, 0])
    return lax.scan(step, h, length=3)[0]


def filling_carry(h):
    step = lambda carry, _: (carry + h[:, ::-1], None)
    return lax.scan(step, jnp.zeros_like(h), length=2)[0] + h


def mapped_channels(h):
    return lax.map(jnp.tanh, h.T).T


def associative_scan(h):
    return lax.associative_scan(jnp.add, h, axis=1)


def custom_reduction(h):
    largest = lambda a, b: jnp.maximum(jnp.abs(a), jnp.abs(b))
    return h - lax.reduce(h, np.float32(0), largest, (1,))[:, None]


def bits(h):
    pieces = lax.bitcast_convert_type(h, np.uint8) & 3
    return pieces.reshape(h.shape[0], -1) * 0.1


def gradient_of_energy(h):
    return jax.grad(lambda y: jnp.sum(jnp.tanh(y) * y[:, ::-1] ** 2))(h)


def hidden_twice(h):
    return jnp.concatenate([h, jax.lax.optimization_barrier(h)[:, 4:9]], 1)


EITHER = [
    plus_its_mirror,
    plus_the_next,
    mirrored_over_the_batch,
    channels_as_batch,
    pairs_multiplied,
    every_other,
    one_replaced,
    window_replaced,
    slice_from_a_constant,
    static_gather,
    static_scatter,
    lower_triangle,
    diagonal,
    trace,
    outer_product,
    matrix_square,
    largest_of_pairs,
    shuffled_groups,
    swapped_on_a_condition,
    switched,
    loop_of_traced_length,
    rotating_carry,
    filling_carry,
    mapped_channels,
    associative_scan,
    custom_reduction,
    bits,
    gradient_of_energy,
    hidden_twice,
]


@pytest.mark.parametrize("middle", EITHER, ids=lambda f: f.__name__)
def test_refused_with_its_place_or_exact(middle):
    fn, params = probe(middle)
    try:
        small, report = compacted(fn, params)
    except compaction.CompactionError as error:
        assert_says_where(error, middle)
        compacted(fn, params, on_unknown="pin")
    else:
        assert hidden_left(small) <= len(ALIVE) or report.kept
