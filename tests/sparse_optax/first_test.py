"""First masks that are given: what is drawn and what is given train alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from sparsejax import saliency, sparse_optax
from sparsejax.masks import Layout

SGD = optax.sgd(0.1, momentum=0.9)
SHAPES = {"blocks": {"kernel": (3, 6, 8)}, "fc": {"kernel": (8, 4), "bias": (4,)}}
LAYOUT = {"blocks": Layout(outputs=(2,), inputs=(1,), batch=(0,))}
METHODS = ["rigl", "set"]


def draw(seed, *leading):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=(*leading, *shape)), jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


PARAMS, GRADIENTS = draw(0), draw(1, 6)


def build(name, **options):
    make = getattr(sparse_optax, name)
    return make(SGD, layout=LAYOUT, update_every=2, key=jax.random.key(3), **options)


@functools.partial(jax.jit, static_argnums=0)
def trained(tx, state):
    def step(carry, gradients):
        params, state = carry
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), sparse_optax.get_masks(state)

    (params, _), masks = lax.scan(step, (PARAMS, state), GRADIENTS)
    return params, masks


@pytest.mark.parametrize("name", METHODS)
def test_from_given_masks_training_goes_on_as_from_drawn_ones(name):
    drawn = build(name, sparsity=0.6)
    state = drawn.init(PARAMS)
    given = build(name, masks=sparse_optax.get_masks(state))
    alike = given.init(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, alike, state)
    jax.tree.map(
        np.testing.assert_array_equal, trained(given, alike), trained(drawn, state)
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_layer_keeps_the_number_that_its_mask_has(name):
    masks = saliency.magnitude(PARAMS, sparsity=0.6, layout=LAYOUT)
    counts = np.asarray(masks["blocks"]["kernel"].sum((1, 2)))
    assert len(set(counts.tolist())) > 1
    tx = build(name, masks=masks)
    params, history = trained(tx, tx.init(PARAMS))
    blocks, fc = history["blocks"]["kernel"], history["fc"]["kernel"]
    np.testing.assert_array_equal(blocks.sum((2, 3)), np.tile(counts, (6, 1)))
    assert set(fc.sum((1, 2)).tolist()) == {int(masks["fc"]["kernel"].sum())}
    assert (blocks[-1] != masks["blocks"]["kernel"]).any()
    assert not params["fc"]["kernel"][~fc[-1]].any()
