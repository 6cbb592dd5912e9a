"""The recipe around a training loop, on a network of two convolutions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsejax import recipes, saliency, sparse_optax
from sparsejax.masks.layout import named_leaves

CLASSES = 5


class Network(nnx.Module):
    def __init__(self, rngs):
        conv = lambda n_in: nnx.Conv(n_in, 4, (3, 3), use_bias=False, rngs=rngs)
        self.stem, self.stem_norm = conv(1), nnx.BatchNorm(4, rngs=rngs)
        self.conv, self.norm = conv(4), nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem_norm(self.stem(x)))
        return self.head(nnx.relu(self.norm(self.conv(x))).mean(axis=(1, 2)))


def batch():
    images = np.random.default_rng(0).normal(size=(10, 5, 5, 1)).astype(np.float32)
    return {"image": images, "label": np.arange(10) % CLASSES}


def hard_loss(model, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels
    return losses(model(batch["image"]), batch["label"]).mean()


def start(recipe, masks=None):
    model = Network(nnx.Rngs(0))
    masks = saliency.magnitude(model, sparsity=0.6) if masks is None else masks
    batches = itertools.repeat(batch())
    began = recipe.start(
        model, batch()["image"], loss=hard_loss, batches=batches, masks=masks
    )
    return model, masks, began


def params(model):
    return named_leaves(nnx.state(model, nnx.Param))


def train(recipe, model, tx, steps):
    """Train, and return the model, its optimizer and what each step was done with."""
    optimizer, seen = nnx.Optimizer(model, tx, wrt=nnx.Param), []
    traced = []

    @nnx.jit
    def train_step(model, optimizer, batch):
        traced.append(type(model).__name__)
        loss = lambda model: recipe.loss(model(batch["image"]), batch["label"]).mean()
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    for step in range(steps):
        model, optimizer = recipe.before_step(step, model, optimizer)
        intensity = getattr(model, "ghost_intensity", None)
        seen.append(None if intensity is None else float(intensity[...]))
        assert np.isfinite(train_step(model, optimizer, batch()))
    return model, optimizer, seen, traced


def test_all_of_it_ends_in_the_plain_network():
    recipe = recipes.ToST(ghost_steps=4, iterations=2)
    model, masks, began = start(recipe)
    tx = sparse_optax.static(
        optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.1, 0.9)), masks=masks
    )
    trained, optimizer, seen, traced = train(recipe, began, tx, 6)
    assert seen == [1.0, 0.75, 0.5, 0.25, None, None]
    assert traced == ["GhostedNetwork", "Network"]
    assert [recipe.selects(step) for step in range(6)] == [False] * 4 + [True] * 2

    assert nnx.graphdef(trained) == nnx.graphdef(model)
    plain = nnx.state(nnx.Optimizer(model, tx, wrt=nnx.Param))
    left = nnx.state(optimizer)
    assert jax.tree.structure(left) == jax.tree.structure(plain)
    assert jax.tree.map(jnp.shape, left) == jax.tree.map(jnp.shape, plain)
    assert np.isfinite(hard_loss(trained, batch()))
    slots = named_leaves(optimizer.opt_state.inner_state)
    for path, mask in named_leaves(masks).items():
        (trace,) = (x for own, x in slots.items() if own.endswith(f"trace/{path}"))
        assert not np.asarray(params(trained)[path])[~mask].any(), path
        assert not np.asarray(trace)[~mask].any(), path
        assert np.asarray(params(trained)[path])[mask].all(), path


def test_the_start_rescales_the_network_of_the_first_step():
    model, masks, began = start(recipes.ToST(ghost_steps=4, iterations=2))
    before = {path: np.asarray(leaf) for path, leaf in params(model).items()}
    ghosted, _ = recipes.add_ghosts(saliency.prune(model, masks), batch()["image"])
    ghosted.eval()
    ghosted.set_attributes(use_running_average=False, raise_if_not_found=False)
    graphdef, state, others = nnx.split(ghosted, nnx.Param, ...)
    expected = recipes.rescaled_init(
        lambda p, batch: hard_loss(nnx.merge(graphdef, p, others, copy=True), batch),
        state,
        itertools.repeat(batch()),
        masks=masks,
        iterations=2,
    )
    pruned = params(ghosted)
    for path, leaf in named_leaves(expected).items():
        np.testing.assert_allclose(params(began)[path], leaf, rtol=1e-5, err_msg=path)
        moved = bool((leaf != pruned[path]).any())
        assert moved == bool(jnp.any(pruned[path] != 0)), path
    assert "norm/ghost_skip/scale" in params(began)
    # What was given stays as it is, and so do statistics.
    for path, leaf in params(model).items():
        np.testing.assert_array_equal(leaf, before[path])
    own = nnx.state(recipes.remove_ghosts(began), nnx.BatchStat)
    fresh = nnx.state(Network(nnx.Rngs(0)), nnx.BatchStat)
    jax.tree.map(np.testing.assert_array_equal, own, fresh)


def test_without_its_parts_it_prunes_and_nothing_else():
    recipe = recipes.ToST(
        ghost_steps=0, neurons=None, skips=False, label_smoothing=0.0, iterations=0
    )
    model, masks, began = start(recipe)
    pruned = params(saliency.prune(model, masks))
    for path, leaf in params(began).items():
        np.testing.assert_array_equal(leaf, pruned[path])
    assert recipe.before_step(0, began, "optimizer") == (began, "optimizer")
    assert recipe.selects(0) and recipe.intensity(0) == 0
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(10, CLASSES)))
    hard = optax.softmax_cross_entropy_with_integer_labels(logits, batch()["label"])
    np.testing.assert_allclose(recipe.loss(logits, batch()["label"]), hard, rtol=1e-6)


@pytest.mark.parametrize(
    ("classes", "smoothing", "floor"),
    [(10, 0.1111, 0.545), (100, 0.10101, 0.785), (200, 0.1005, 0.854)],
)
def test_label_smoothing_is_that_of_the_authors(classes, smoothing, floor):
    recipe = recipes.ToST(ghost_steps=1)
    assert recipe.smoothing(classes) == pytest.approx(smoothing, abs=5e-5)
    shares = np.full(classes, 0.1 / (classes - 1))
    shares[3] = 0.9
    assert shares.sum() == pytest.approx(1)
    # The loss is least where the network gives these shares, and then their entropy.
    found = recipe.loss(jnp.log(shares)[None], jnp.array([3]))
    assert float(found[0]) == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-5)
    assert float(found[0]) == pytest.approx(floor, abs=5e-4)


def test_dynamic_masks_leave_the_ghosts_dense():
    recipe = recipes.ToST(ghost_steps=3, iterations=0)
    tx = sparse_optax.rigl(optax.sgd(0.1, 0.9), sparsity=0.5, update_every=2)
    masks = sparse_optax.get_masks(tx.init(nnx.state(Network(nnx.Rngs(0)), nnx.Param)))
    _, _, began = start(recipe, masks)
    trained, optimizer, _, _ = train(recipe, began, tx, 5)
    last = named_leaves(sparse_optax.get_masks(optimizer.opt_state))
    first = named_leaves(masks)
    assert last.keys() == first.keys()
    assert {p: int(m.sum()) for p, m in last.items()} == {
        p: int(m.sum()) for p, m in first.items()
    }
    assert any((last[path] != first[path]).any() for path in last)
    for path, mask in last.items():
        assert not np.asarray(params(trained)[path])[~mask].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ghost_steps": 1.5}, "ghost_steps=...\\) must be an integer of at least 0"),
        ({"ghost_steps": 1, "iterations": -1}, "iterations=...\\) must be an integer"),
        ({"ghost_steps": 0}, "must be above 0 where there are ghosts"),
        (
            {"ghost_steps": 5, "neurons": None, "skips": False},
            "and 0 where there are none, got 5",
        ),
        ({"ghost_steps": 1, "label_smoothing": 1.0}, "lie in \\[0, 1\\), got 1.0"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        recipes.ToST(**options)
