"""Chase on networks: the channels that can go, and compaction after it."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsejax import compaction, models, sparse_optax
from sparsejax.sparse_optax._groups import channel_floors, prunable_groups


class Network(nnx.Module):
    """A stem, a residual block, a linear layer."""

    def __init__(self, rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        self.stem, self.stem_norm = conv(3, 8), nnx.BatchNorm(8, rngs=rngs)
        self.conv1, self.norm1 = conv(8, 12), nnx.BatchNorm(12, rngs=rngs)
        self.conv2, self.norm2 = conv(12, 8), nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem_norm(self.stem(x)))
        y = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(x + self.norm2(self.conv2(y)))
        return self.head(x.mean((1, 2)))


@pytest.mark.parametrize("skip", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_is_trained_compacts_by_exactly_the_dead_channels(skip):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(16, 6, 6, 3)), jnp.float32)
    classes = jnp.asarray(rng.integers(0, 4, 16))
    model = Network(nnx.Rngs(0))
    report = compaction.channel_groups(nnx.view(model, use_running_average=True), x)
    tx = sparse_optax.chase(
        optax.sgd(0.1, momentum=0.9),
        sparsity=0.6,
        channel_sparsity=0.5,
        groups=report,
        skip=skip,
        update_every=4,
        stop_soft_at=16,
        stop_at=28,
        remove_every=4,
        stop_removal_at=16,
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, sparse_optax.apply_masks(params, optimizer.opt_state))

    @nnx.jit
    def train(model, optimizer):
        def loss(model):
            logits = model(x)
            losses = optax.softmax_cross_entropy_with_integer_labels
            return losses(logits, classes).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    for _ in range(30):
        train(model, optimizer)
    model.eval()
    live = nnx.as_pure(optimizer.opt_state).budgets.live
    names = [one.name for one in prunable_groups(report, skip=skip)]
    assert names == (["stem", "conv1"] if skip else ["conv1"])
    dead = {n: int((~one).sum()) for n, one in zip(names, live, strict=True)}
    assert sum(dead.values()) == (10 if skip else 6)
    small, after = compaction.compact(model, x)
    assert after.removed == {name: n for name, n in dead.items() if n}
    np.testing.assert_allclose(small(x), model(x), rtol=1e-5, atol=1e-5)
    assert depends_on_input(model(x))


def depends_on_input(y):
    return float(y.std(axis=0).max()) > 1e-3


NETWORKS = {
    "vgg19": (lambda: models.vgg_cifar(19, 100, rngs=nnx.Rngs(0)), 32, 4992, 512),
    "resnet50": (lambda: models.resnet(50, rngs=nnx.Rngs(0)), 64, 7552, 3904),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_the_published_channels_are_prunable(network):
    make, size, published, skipped = NETWORKS[network]
    model = nnx.eval_shape(make)
    model.eval()
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    report = compaction.channel_groups(model, x)
    count = lambda skip: sum(g.size for g in prunable_groups(report, skip=skip))
    assert count(False) == published
    assert count(True) == published + skipped


@pytest.mark.parametrize(
    ("channel_sparsity", "min_channels", "floors"),
    [
        (0.5, 0.2, [6, 12, 25, 51]),
        (0.5, 0.5, [16, 32, 64, 128]),
        (0.4, 0.2, [7, 15, 30, 61]),
    ],
)
def test_floors_are_the_published_ones(channel_sparsity, min_channels, floors):
    groups = [SimpleNamespace(size=n) for n in (64, 128, 256, 512)]
    found = channel_floors(groups, channel_sparsity, min_channels)
    assert [int(n) for n in found] == floors
