"""Ghosts through training under masks, their fade and removal."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparsejax import compaction, masks, recipes, schedules, serving, sparse_optax

DRAWN = np.random.default_rng(0)
IMAGES = jnp.asarray(DRAWN.normal(size=(8, 6, 6, 3)), jnp.float32)
LABELS = jnp.arange(8) % 4
FADED = 2


class Network(nnx.Module):
    def __init__(self, rngs):
        options = {"use_bias": False, "rngs": rngs}
        self.stem = nnx.Conv(3, 4, (3, 3), **options)
        self.conv = nnx.Conv(4, 8, (3, 3), strides=2, **options)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, **options)
        self.norm2 = nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(nnx.relu(self.stem(x)))))
        return self.head(nnx.relu(self.norm2(self.depthwise(x))).mean((1, 2)))


def ghosted_network(seed=0):
    plain = Network(nnx.Rngs(seed))
    return plain, recipes.add_ghosts(plain, IMAGES)[0]


def loss(model, images):
    losses = optax.softmax_cross_entropy_with_integer_labels
    return losses(model(images), LABELS).mean()


def momentum():
    return optax.chain(optax.add_decayed_weights(2e-4), optax.sgd(0.1, momentum=0.9))


OPTIMIZERS = {
    "rigl": lambda: sparse_optax.rigl(
        momentum(), sparsity=0.8, update_every=2, stop_at=4
    ),
    "momentum": lambda: sparse_optax.static(momentum(), sparsity=0.8),
    "adam": lambda: sparse_optax.static(optax.adamw(1e-2), sparsity=0.8),
    "global magnitude": lambda: sparse_optax.magnitude(
        optax.adam(1e-2), sparsity=0.8, scope="global", stop_at=4
    ),
    "last link": lambda: optax.chain(
        optax.trace(0.9), optax.scale(-0.1), sparse_optax.set(sparsity=0.8)
    ),
    "wrapped": lambda: optax.MultiSteps(
        optax.inject_hyperparams(optax.adafactor)(1e-2), every_k_schedule=2
    ),
}


def named(tree):
    return masks.layout.named_leaves(nnx.as_pure(tree))


@pytest.mark.parametrize(
    "name", ["momentum", pytest.param("rigl", marks=pytest.mark.slow)]
)
def test_trains_under_a_fade_and_ends_as_the_plain_network(name):
    plain, model = ghosted_network()
    tx = OPTIMIZERS[name]()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    fade = schedules.linear_fade(FADED)
    traces = []

    @nnx.jit
    def train_step(model, optimizer):
        traces.append(1)
        recipes.set_intensity(model, fade(optimizer.step[...]))
        gradients = nnx.grad(loss)(model, IMAGES)
        optimizer.update(model, gradients)

    start = named(nnx.state(model, nnx.Param))
    intensities = []
    for step in range(FADED + 3):
        train_step(model, optimizer)
        intensities.append(float(model.ghost_intensity[...]))
        if step == FADED - 1:
            # Afterwards only momentum and weight decay move the ghosts.
            moved = named(nnx.state(model, nnx.Param))
    assert intensities == [1.0, 0.5, 0.0, 0.0, 0.0]
    assert len(traces) == 1
    for path in (path for path in start if recipes.is_ghost(path)):
        assert (start[path] != moved[path]).any()
    active = named(sparse_optax.get_masks(optimizer.opt_state))
    weights = named(nnx.state(model, nnx.Param))
    slots = [
        (path, slot)
        for path, slot in named(nnx.as_pure(optimizer.opt_state)).items()
        if "trace" in path
    ]
    assert active and slots
    for path, mask in active.items():
        own = [slot for name, slot in slots if name.endswith(path)]
        for off_the_mask in (weights[path], *own):
            assert (np.asarray(off_the_mask)[~np.asarray(mask)] == 0).all()

    removed, left = recipes.remove_ghosts(model), recipes.remove_ghosts(optimizer)
    expected = nnx.Optimizer(plain, tx, wrt=nnx.Param)
    assert nnx.graphdef(removed) == nnx.graphdef(plain)
    assert nnx.graphdef(left) == nnx.graphdef(expected)
    for tree, like in ((removed, plain), (left, expected)):
        got, shapes = nnx.state(tree), nnx.state(like)
        assert jax.tree.structure(got) == jax.tree.structure(shapes)
        assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, shapes)
    assert not any(map(recipes.is_ghost, named(nnx.state((removed, left)))))
    before = named(nnx.state((model, optimizer)))
    for path, leaf in named(nnx.state((removed, left))).items():
        np.testing.assert_array_equal(leaf, before[path])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ghosts_are_in_no_mask_and_in_no_budget_and_leave_every_state(name):
    plain, model = ghosted_network()
    tx = OPTIMIZERS[name]()
    expected = tx.init(nnx.state(plain, nnx.Param))
    state = tx.init(nnx.state(model, nnx.Param))
    removed = recipes.remove_ghosts(state)
    assert jax.tree.structure(removed) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, removed, expected)
    if name != "wrapped":
        active = named(sparse_optax.get_masks(state))
        assert not any(map(recipes.is_ghost, active))
        assert active.keys() == named(sparse_optax.get_masks(expected)).keys()


def test_other_trees_of_parameters_lose_their_ghosts_too():
    plain, model = ghosted_network()
    as_dicts = lambda model: nnx.to_pure_dict(nnx.state(model, nnx.Param))
    tx = optax.partition(
        {"decayed": optax.adamw(1e-3), "other": optax.sgd(0.1, momentum=0.9)},
        lambda params: jax.tree.map(
            lambda x: "decayed" if jnp.ndim(x) > 1 else "other", params
        ),
    )
    got = recipes.remove_ghosts(tx.init(as_dicts(model)))
    expected = tx.init(as_dicts(plain))
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    params = {"norm": {"ghost_skip": {"scale": 1}}, "empty": {}, "rest": (2, None)}
    assert recipes.remove_ghosts(params) == {"empty": {}, "rest": (2, None)}


def test_a_predicate_of_ones_own_is_combined_with_is_ghost():
    _, model = ghosted_network()
    params = nnx.state(model, nnx.Param)
    any_matrix = lambda path, leaf: leaf.ndim >= 2
    without = lambda path, leaf: any_matrix(path, leaf) and not recipes.is_ghost(path)
    regexes = {"head": 0.0, "conv/kernel": 0.5}
    for where, expected in (
        (any_matrix, True),
        (without, False),
        (regexes, False),
        (None, False),
    ):
        chosen = masks.select_leaves(params, where=where)
        assert any(map(recipes.is_ghost, chosen)) == expected


@pytest.mark.slow
def test_seeds_and_intensities_train_under_one_vmap():
    def gradients(key, intensity):
        model = recipes.add_ghosts(Network(nnx.Rngs(key)), IMAGES)[0]
        recipes.set_intensity(model, intensity)
        own = nnx.grad(loss)(model, IMAGES)
        return nnx.as_pure(nnx.state(own)), model.norm.mean[...]

    keys = jax.random.split(jax.random.key(0), 2)
    together, means = jax.jit(jax.vmap(gradients))(keys, jnp.array([0.0, 0.5]))
    assert np.abs(means[0] - means[1]).min() > 0
    for path, leaf in named(together).items():
        if recipes.is_ghost(path):
            assert (np.asarray(leaf[0]) == 0).all()
    alone, mean = jax.jit(gradients)(keys[1], 0.5)
    np.testing.assert_allclose(means[1], mean, rtol=1e-4, atol=1e-6)
    for path, leaf in named(alone).items():
        np.testing.assert_allclose(
            named(together)[path][1], leaf, rtol=1e-3, atol=1e-5, err_msg=path
        )


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_batch_gives_the_same(axis_type):
    _, model = ghosted_network()
    recipes.set_intensity(model, 0.5)
    value_and_grad = nnx.jit(nnx.value_and_grad(loss))
    expected = value_and_grad(nnx.clone(model), IMAGES)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        replicated = NamedSharding(mesh, PartitionSpec())
        nnx.update(model, jax.device_put(nnx.state(model), replicated))
        images = jax.device_put(IMAGES, NamedSharding(mesh, PartitionSpec("data")))
        got = value_and_grad(model, images)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    for path, leaf in named(nnx.state(expected[1])).items():
        other = named(nnx.state(got[1]))[path]
        np.testing.assert_allclose(other, leaf, rtol=1e-3, atol=1e-5, err_msg=path)


def test_what_is_compacted_and_exported_has_no_ghosts(tmp_path):
    _, model = ghosted_network()
    removed = recipes.remove_ghosts(model)
    removed.eval()
    kernel = removed.depthwise.kernel
    kernel.set_value(kernel[...].at[..., 2:5].set(0))
    removed.norm2.scale.set_value(removed.norm2.scale[...].at[2:5].set(0))
    small, _ = compaction.compact(removed, IMAGES)
    assert small.conv.kernel.shape == (3, 3, 4, 5)
    assert not any(map(recipes.is_ghost, named(nnx.state(small))))
    serving.export(small, tmp_path / "model", IMAGES, platforms=("cpu",))
    served = serving.load(tmp_path / "model")
    np.testing.assert_allclose(served(IMAGES), removed(IMAGES), rtol=1e-5, atol=1e-6)
