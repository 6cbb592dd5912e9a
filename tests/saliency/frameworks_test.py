"""Masks for NNX, Linen and bare functions, and on to training and serving."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

from sparsejax import saliency, sparse_optax
from sparsejax.masks.layout import named_leaves


def weights():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    first = {"kernel": draw(4, 6), "bias": draw(6)}
    return {"first": first, "last": {"kernel": draw(6, 3), "bias": draw(3)}}


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 6, rngs=rngs)
        self.last = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Dense(6, name="first")(x))
        return linen.Dense(3, name="last")(x)


def bare(params, x):
    x = x @ params["first"]["kernel"] + params["first"]["bias"][None]
    return jax.nn.relu(x) @ params["last"]["kernel"] + params["last"]["bias"][None]


def loss_of(apply):
    def loss(params, batch):
        x, y = batch
        logits = apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss


def batches():
    x = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)
    return [(x, np.arange(8) % 3)]


def module():
    model = Nnx(nnx.Rngs(0))
    nnx.update(model, weights())
    return model


def test_frameworks_have_the_same_masks():
    model = module()
    graphdef, state = nnx.split(model)
    subjects = [
        (lambda params, x: nnx.merge(graphdef, params)(x), state),
        (lambda model, x: model(x), model),
        (lambda params, x: Linen().apply({"params": params}, x), weights()),
        (bare, weights()),
    ]
    for method in (saliency.snip, saliency.grasp):
        found = [
            method(loss_of(apply), params, batches(), sparsity=0.6)
            for apply, params in subjects
        ]
        found = [named_leaves(masks) for masks in found]
        assert list(found[0]) == ["first/kernel", "last/kernel"]
        assert sum(int(mask.sum()) for mask in found[0].values()) == 42 - 25
        for masks in found[1:]:
            chex.assert_trees_all_equal(masks, found[0])


def test_a_module_is_pruned_and_trained_on_under_its_masks():
    model = module()
    masks = saliency.magnitude(model, sparsity=0.8)
    model = saliency.prune(model, masks)
    active = lambda: [layer.kernel[...] != 0 for layer in (model.first, model.last)]
    before = active()
    assert sum(int(x.sum()) for x in before) == 42 - 33

    tx = sparse_optax.static(optax.adam(0.1), masks=masks)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    loss = loss_of(lambda model, x: model(x))
    (batch,) = batches()
    first = loss(model, batch)
    grad = nnx.jit(nnx.grad(loss))
    for _ in range(3):
        optimizer.update(model, grad(model, batch))
    assert loss(model, batch) < first
    chex.assert_trees_all_equal(active(), before)
    assert bool(jnp.any(model.first.bias[...] != weights()["first"]["bias"]))
