"""Models whose layers run from blocks: chosen, exact, trained, compacted, exported."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsejax import compaction, serving
from sparsejax.serving import Blocks, Measured, block_sparse, block_sparse_choice

IMAGES = jnp.asarray(np.random.default_rng(7).normal(size=(3, 7, 7, 3)), jnp.float32)
CONV, LINEAR = "body/0/kernel", "head/kernel"


class Net(nnx.Module):
    """Two convolutions, one of them referred to twice, and a linear layer."""

    def __init__(self, rngs):
        conv = nnx.Conv(3, 8, (3, 3), strides=2, padding=[(1, 1), (1, 1)], rngs=rngs)
        self.body = nnx.List([conv, nnx.Conv(8, 8, (1, 1), use_bias=False, rngs=rngs)])
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 6, dtype=jnp.float32, rngs=rngs)
        self.same = conv

    def __call__(self, x):
        x = nnx.relu(self.norm(self.body[0](x)))
        return self.head(self.body[1](x).mean((1, 2)))


def pairs():
    """Return blocks of the first convolution and of the head; both leave out rows."""
    rng = np.random.default_rng(0)
    chosen = lambda n, k: rng.permutation(n)[:k]
    return {
        CONV: [([0, 3, 5], chosen(27, 12)), ([1, 2], chosen(27, 5))],
        LINEAR: [([0, 1, 4], chosen(8, 4)), ([5], chosen(8, 3))],
    }


@pytest.fixture
def masked():
    model = Net(nnx.Rngs(0))
    model.eval()
    rng = np.random.default_rng(1)
    for leaf in (model.norm.scale, model.norm.bias, model.norm.mean):
        leaf.set_value(jnp.asarray(rng.normal(size=leaf.shape), jnp.float32))
    for layer, own in zip((model.body[0], model.head), pairs().values(), strict=True):
        mask = Blocks(layer.kernel.shape, own).mask
        layer.kernel.set_value(layer.kernel[...] * mask)
        layer.bias.set_value(jnp.asarray(rng.normal(size=layer.bias.shape), "f4"))
    return model


def stored(forms, conv=(3, 3, 3, 8), image=(3, 7, 7, 3)):
    """Return measurements that say which form is the fastest."""
    own = pairs()
    described = {
        CONV: block_sparse_choice.describe(
            Blocks(conv, own[CONV]), image, strides=(2, 2), padding=1
        ),
        LINEAR: block_sparse_choice.describe(Blocks((8, 6), own[LINEAR]), (3, 8)),
    }
    names = ("dense", "unfolded", "gathered", "padded", "rows")
    return {
        path: Measured(described[path], {n: 2.0 - (n == form) for n in names})
        for path, form in forms.items()
    }


@pytest.mark.parametrize("conv", ["unfolded", "gathered", "padded", "rows"])
def test_layers_are_swapped_as_stored_measurements_say(masked, conv):
    measured = stored({CONV: conv, LINEAR: "padded"})
    before = jax.tree.map(np.asarray, nnx.state(masked))
    fast, swapped = serving.with_blocks(masked, pairs(), IMAGES, measured=measured)
    assert swapped.forms == {CONV: conv, LINEAR: "padded"}
    assert swapped.measured == measured
    assert isinstance(fast.body[0], serving.BlockSparseConv)
    assert fast.same is fast.body[0]
    assert isinstance(fast.body[1], nnx.Conv)
    assert isinstance(fast.head, serving.BlockSparseLinear)
    assert swapped.max_error <= 1e-5 * swapped.scale
    np.testing.assert_allclose(fast(IMAGES), masked(IMAGES), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(fast.body[0].kernel(), masked.body[0].kernel[...])
    count = lambda model: sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    if conv != "unfolded":
        assert count(fast) == count(masked) - (27 * 8 - 46) - (8 * 6 - 15)
    after = nnx.state(masked)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))  # it stays


def test_what_is_measured_is_chosen_and_can_be_stored(masked, monkeypatch):
    seen = []

    def time(calls, seconds):
        seen.append((sorted(calls), seconds))
        return {name: np.array([1, 3, 1.0 + (name != "gathered")]) for name in calls}

    monkeypatch.setattr(block_sparse_choice, "times_in_turn", time)
    fast, swapped = serving.with_blocks(masked, pairs(), IMAGES)
    assert swapped.forms == {CONV: "gathered", LINEAR: "gathered"}
    assert [names for names, _ in seen] == [
        ["dense", "gathered", "padded", "rows", "unfolded"],
        ["dense", "gathered", "padded"],
    ]
    text = json.dumps({path: m._asdict() for path, m in swapped.measured.items()})
    again = {path: Measured(**m) for path, m in json.loads(text).items()}
    monkeypatch.undo()
    other, swapped = serving.with_blocks(masked, pairs(), IMAGES, measured=again)
    assert nnx.graphdef(other) == nnx.graphdef(fast)
    assert str(swapped).startswith(
        "body/0/kernel (21%): gathered; dense 2e+03 ms, unfolded 2e+03 ms, gathered 1e"
    )


def test_what_is_far_too_slow_is_timed_once(monkeypatch):
    now = [0.0]
    cost = {"dense": 2.0, "unfolded": 9.0, "gathered": 6.5, "padded": 5.5, "rows": 0.5}

    def call(name):
        now[0] += cost[name]
        return ()

    monkeypatch.setattr(block_sparse_choice.time, "perf_counter", lambda: now[0])
    calls = {name: functools.partial(call, name) for name in cost}
    times = block_sparse_choice.times_in_turn(calls, seconds=0)
    rounds = {name: values.tolist() for name, values in times.items()}
    assert rounds == {
        name: [seconds] * (5 if seconds < 6 else 1) for name, seconds in cost.items()
    }


def test_a_real_measurement():
    blocks = Blocks((3, 3, 4, 6), [([0, 2, 5], np.arange(0, 36, 3))])
    measured = serving.measure_forms(blocks, (2, 5, 5, 4), jnp.bfloat16, seconds=0)
    assert list(measured.seconds) == ["dense", "unfolded", "gathered", "padded", "rows"]
    assert all(0 < seconds < 10 for seconds in measured.seconds.values())
    fastest = min(measured.seconds, key=measured.seconds.__getitem__)
    assert measured.best in (fastest, "dense")
    assert measured.what == (
        "cpu: Blocks((3, 3, 4, 6), 3x12) on bfloat16[2, 5, 5, 4], strides (1, 1), "
        "padding ((1, 1), (1, 1))"
    )
    best = lambda **seconds: Measured("", {"dense": 1.0, **seconds}).best
    assert best(rows=0.91) == best(rows=1.0, padded=2.0) == "dense"
    assert best(rows=0.85, padded=0.8) == "padded"


def test_a_layer_that_computes_something_else_is_found(masked, monkeypatch):
    right = block_sparse._RUN["rows"]
    wrong = lambda *args: 1.01 * right(*args)
    monkeypatch.setitem(block_sparse._RUN, "rows", wrong)
    measured = stored({CONV: "rows", LINEAR: "dense"})
    with pytest.raises(compaction.CompactionError, match="differs from the masked one"):
        serving.with_blocks(masked, pairs(), IMAGES, measured=measured)


def test_where_dense_is_fastest_the_layer_stays(masked):
    measured = stored({CONV: "dense", LINEAR: "gathered"})
    fast, _ = serving.with_blocks(masked, pairs(), IMAGES, measured=measured)
    assert type(fast.body[0]) is nnx.Conv
    assert type(fast.head) is serving.BlockSparseLinear


def test_it_trains_as_the_masked_model_does(masked):
    measured = stored({CONV: "rows", LINEAR: "gathered"})
    own = pairs()
    fast, _ = serving.with_blocks(masked, own, IMAGES, measured=measured)
    masks = {
        path: Blocks(shape, own[path]).mask
        for path, shape in ((CONV, (3, 3, 3, 8)), (LINEAR, (8, 6)))
    }

    def train(model, masks):
        optimizer = nnx.Optimizer(model, optax.sgd(0.1, 0.9), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            loss = lambda model: (model(IMAGES) ** 2).mean()
            optimizer.update(model, nnx.grad(loss)(model))

        for _ in range(3):
            step(model, optimizer)
            for layer, mask in masks:
                layer.kernel.set_value(layer.kernel[...] * mask)
        return model(IMAGES)

    layers = zip((masked.body[0], masked.head), masks.values(), strict=True)
    expected = train(masked, list(layers))
    np.testing.assert_allclose(train(fast, []), expected, rtol=1e-4, atol=1e-5)


def test_it_is_exported_for_any_batch(masked, tmp_path):
    measured = stored({CONV: "rows", LINEAR: "gathered"})
    fast, _ = serving.with_blocks(masked, pairs(), IMAGES, measured=measured)
    path = tmp_path / "fast.safetensors"
    serving.export(fast, path, IMAGES)
    served = serving.load(path)
    assert (
        str(served.signature) == "(x: float32[b, 7, 7, 3]) -> (output: float32[b, 6])"
    )
    for batch in (1, 3, 5):
        x = jnp.resize(IMAGES, (batch, 7, 7, 3))
        np.testing.assert_allclose(served(x), masked(x), rtol=1e-5, atol=1e-6)


def test_channels_are_removed_first(masked):
    groups = compaction.channel_groups(masked, IMAGES)
    masked = groups.zero(masked, {"body/0": [4, 6, 7]})  # rows of no block
    small, report = compaction.compact(masked, IMAGES)
    assert small.body[0].kernel.shape == (3, 3, 3, 5)
    left = Blocks((3, 3, 3, 8), pairs()[CONV]).take(report.plan.keep[CONV])
    what = block_sparse_choice.describe(left, IMAGES.shape, strides=2, padding=1)
    measured = {CONV: Measured(what, {"dense": 2.0, "rows": 1.0})}
    fast, _ = serving.with_blocks(small, {CONV: left.blocks}, IMAGES, measured=measured)
    np.testing.assert_allclose(fast(IMAGES), masked(IMAGES), rtol=1e-5, atol=1e-6)


def with_conv(**options):
    model = nnx.Sequential(nnx.Conv(4, 8, rngs=nnx.Rngs(0), **options))
    pairs = [(np.arange(8), np.arange(np.prod(model.layers[0].kernel.shape[:-1])))]
    return model, {"layers/0/kernel": pairs}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": (3,)}, r"nnx.Conv with kernel_size=\(3,\)"),
        ({"kernel_size": (3, 3), "padding": "CIRCULAR"}, "padding='CIRCULAR'"),
        ({"kernel_size": (3, 3), "feature_group_count": 2}, "feature_group_count=2"),
        ({"kernel_size": (3, 3), "kernel_dilation": (2, 1)}, r"kernel_dilation=\(2, 1"),
        ({"kernel_size": (3, 3), "mask": jnp.ones((3, 3, 4, 8))}, "mask="),
    ],
)
def test_layers_that_blocks_cannot_stand_for_are_refused(options, message):
    model, blocks = with_conv(**options)
    with pytest.raises(
        compaction.CompactionError, match=f"layers/0/kernel must.*{message}"
    ):
        serving.with_blocks(model, blocks, jnp.ones((1, 5, 5, 4)))


def test_wrong_requests(masked):
    one = {LINEAR: pairs()[LINEAR]}
    swap = lambda blocks, **kw: serving.with_blocks(masked, blocks, IMAGES, **kw)
    with pytest.raises(
        compaction.CompactionError, match="norm/scale must.*head/kernel"
    ):
        swap({"norm/scale": []})
    with pytest.raises(compaction.CompactionError, match="outside.* 3 of its weights"):
        swap({LINEAR: pairs()[LINEAR][:1] + [([5], [])]})
    with pytest.raises(ValueError, match="head/kernel must have at least one block"):
        swap({LINEAR: []})
    with pytest.raises(ValueError, match=r"head/kernel: .* rows .*\[0, 6\)"):
        swap({LINEAR: [([6], [0])]})
    wrong = stored({LINEAR: "padded"})[LINEAR]._replace(what="tpu: something")
    with pytest.raises(ValueError, match="head/kernel needs .* got one of tpu"):
        swap(one, measured={LINEAR: wrong})
    masked.train()
    with pytest.raises(compaction.CompactionError, match=r"model.eval\(\)"):
        swap(one)


def test_a_layer_that_is_not_called_is_refused(masked):
    masked.spare = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    with pytest.raises(compaction.CompactionError, match="it is called with \\[\\]"):
        serving.with_blocks(masked, {"spare/kernel": [(range(4), range(4))]}, IMAGES)
