"""SRigL: fan-ins, ablation, what goes with ablated neurons, and compaction after it."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import network_shapes
import numpy as np
import optax
import oracles
import pytest
import srigl_oracle
from flax import nnx
from jax import lax

from sparsejax import analysis, compaction, models, sparse_optax
from sparsejax.masks import Layout

STEPS = 12
SHAPES = {
    "conv": (3, 3, 4, 8),
    "query": (8, 2, 6),
    "stack": (2, 16, 12),
    "head": (12, 10),
}
LAYOUTS = {
    "query": Layout(outputs=(-2, -1), inputs=(-3,)),
    "stack": Layout(batch=(0,)),
}
LAYERS = {
    "conv": (8, 4, 3, 3),
    "query": (12, 8),
    "stack[0]": (12, 16),
    "stack[1]": (12, 16),
    "head": (10, 12),
}
SGD = optax.sgd(0.05, momentum=0.9)
KEPT = oracles.erk(LAYERS, 0.7)
FAN_IN = {path: kept // LAYERS[path][0] for path, kept in KEPT.items()}


def srigl(inner=SGD, **options):
    defaults = dict(sparsity=0.7, gamma=0.6, layout=LAYOUTS, update_every=2)
    return sparse_optax.srigl(inner, **defaults | options)


def draw(*lead, seed=0):
    """Draw leaves whose neurons differ, so that some are ablated."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for name, shape in SHAPES.items():
        neurons = rng.gamma(0.4, size=(*lead, *shape[-2 if name == "query" else -1 :]))
        spread = neurons.reshape(
            *lead,
            *[1] * (len(shape) - neurons.ndim + len(lead)),
            *neurons.shape[len(lead) :],
        )
        drawn[name] = np.float32(rng.normal(size=(*lead, *shape)) * spread)
    return drawn


PARAMS, GRADIENTS = draw(), draw(STEPS, seed=1)


def scanned(tx, state, params=PARAMS, gradients=GRADIENTS):
    """Train on given gradients; return masks and parameters after every call."""

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        masks = sparse_optax.get_masks(state)
        return (params, state), (masks, params, state.inner_state)

    return lax.scan(step, (params, state), gradients)[1]


@functools.cache
def trained(**options):
    tx = srigl(**options)
    return jax.device_get(jax.jit(functools.partial(scanned, tx))(tx.init(PARAMS)))


def matrices(masks):
    """Return the masks of a step or of all as [..., neurons, inputs], by layer."""
    found = {}
    for name, mask in masks.items():
        layout = LAYOUTS.get(name, Layout())
        ndim = len(SHAPES[name])
        to_matrix = layout.to_matrix
        for _ in range(mask.ndim - ndim):
            to_matrix = jax.vmap(to_matrix)
        matrix = np.asarray(to_matrix(jnp.asarray(mask)))
        if name == "stack":
            found |= {f"stack[{i}]": matrix[..., i, :, :] for i in range(2)}
        else:
            found[name] = matrix
    return found


# Fan-ins


def test_first_masks_have_one_fan_in():
    state = srigl().init(PARAMS)
    for path, mask in matrices(sparse_optax.get_masks(state)).items():
        assert (mask.sum(axis=1) == FAN_IN[path]).all(), path


@pytest.mark.parametrize("sparsity", [0.9, 0.95, 0.99])
def test_resnet18_has_the_published_fan_ins(sparsity):
    """Budgets and thresholds are those of the released code; see the distributions."""
    shapes = network_shapes.resnet18_cifar()
    params = {path: jnp.zeros(shape) for path, shape in shapes.items()}
    tx = sparse_optax.srigl(sparsity=sparsity, protect="^linear")
    state = tx.init(params)
    kept, thresholds = (jax.device_get(tree) for tree in state.budgets)
    fan_ins = {path: int(n) // shapes[path][-1] for path, n in kept.items()}
    k = {0.9: (27, 276, 198), 0.95: (27, 134, 96), 0.99: (13, 25, 18)}[sparsity]
    names = "conv1", "stage1/block0/conv1", "stage4/block0/shortcut"
    assert tuple(fan_ins[f"{name}/kernel"] for name in names) == k
    for path, mask in sparse_optax.get_masks(state).items():
        counts = jax.device_get(mask.sum(axis=(0, 1, 2) if mask.ndim == 4 else 0))
        assert (counts == fan_ins[path]).all(), path
        dense = fan_ins[path] == math.prod(shapes[path][:-1])
        free = not dense and path != "linear/kernel"
        own = srigl_oracle.threshold(0.3, fan_ins[path]) if free else 0
        assert thresholds[path] == own
    active = sum(n * shapes[path][-1] for path, n in fan_ins.items())
    realised = {0.9: 0.09988, 0.95: 0.04978, 0.99: 0.00977}[sparsity]
    assert active / 11_164_352 == pytest.approx(realised, abs=5e-6)


# Updates


@pytest.mark.parametrize("official", [False, True])
def test_masks_are_those_of_the_oracle(official):
    masks, params, _ = trained(official=official)
    before = sparse_optax.get_masks(srigl(official=official).init(PARAMS))
    ablated = 0
    for step in range(STEPS):
        now = {name: mask[step] for name, mask in masks.items()}
        if step == 0 or step % 2:
            jax.tree.map(np.testing.assert_array_equal, now, dict(before))
        else:
            weights = matrices({n: p[step - 1] for n, p in params.items()})
            gradients = matrices({n: g[step] for n, g in GRADIENTS.items()})
            old, new = matrices(before), matrices(now)
            for path in LAYERS:
                if KEPT[path] == old[path].size:
                    assert new[path].all()
                    continue
                n_drop = int(old[path].sum()) * 3 // 10
                gamma = 0 if path == "head" else 0.6
                tau = srigl_oracle.threshold(gamma, FAN_IN[path])
                update = srigl_oracle.update
                update = srigl_oracle.official_update if official else update
                expected = update(
                    old[path], weights[path], gradients[path], n_drop, KEPT[path], tau
                )
                np.testing.assert_array_equal(new[path], expected)
                ablated += (~expected.any(axis=1)).sum()
        before = now
    assert ablated > 10


def test_live_neurons_keep_to_the_budget():
    masks, params, inner_state = trained()
    assert all((p[~masks[name]] == 0).all() for name, p in params.items())
    trace = optax.tree.get(inner_state, "trace")
    assert all((s[~masks[name]] == 0).all() for name, s in trace.items())
    died = revived = 0
    for path, history in matrices(masks).items():
        for before, mask in zip(history[:-1], history[1:], strict=True):
            counts = mask.sum(axis=1)
            (k,) = set(counts) - {0}
            live = (counts > 0).sum()
            assert k * live <= KEPT[path] < (k + 1) * live or not mask.any(1).all()
            was = before.any(axis=1)
            died += (was & (counts == 0)).sum()
            revived += (~was & (counts > 0)).sum()
        assert path != "head" or history.any(axis=-1).all()
    assert died and revived


def test_ablation_is_permanent_without_revival():
    masks, _, _ = trained(revive=False)
    died = 0
    for history in matrices(masks).values():
        live = history.any(axis=-1)
        assert not (live[1:] & ~live[:-1]).any()
        died += (live[:-1] & ~live[1:]).sum()
    assert died


def test_no_ablation_is_gamma_zero_or_everything_protected():
    masks, params, _ = trained(gamma=0.0)
    for path, history in matrices(masks).items():
        assert (history.sum(axis=-1) == FAN_IN[path]).all()
    everything, same_params, _ = trained(protect=".")
    jax.tree.map(np.testing.assert_array_equal, masks, everything)
    jax.tree.map(np.testing.assert_array_equal, params, same_params)


def test_an_absolute_threshold():
    """Where nobody reaches it, it falls as far as the budget of the layer needs."""
    masks, _, _ = trained(gamma=1000)
    assert (~matrices(masks)["conv"].any(axis=-1)).any()


def test_one_compilation_serves_every_gamma_and_sparsity():
    traces = []

    def run(state):
        traces.append(None)
        return scanned(srigl(), state)

    settings = [(gamma, s) for gamma in (0.0, 0.3, 0.6, 2) for s in (0.6, 0.7)]
    states = [srigl(gamma=g, sparsity=s).init(PARAMS) for g, s in settings]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    masks, _, _ = jax.jit(jax.vmap(run))(stacked)
    assert len(traces) == 1
    alone, _, _ = trained()
    mine = jax.tree.map(lambda x: x[settings.index((0.6, 0.7))], masks)
    jax.tree.map(np.testing.assert_array_equal, mine, alone)
    live = np.asarray(masks["conv"].any(axis=(2, 3, 4))).sum(axis=(1, 2))
    assert len(set(live.tolist())) > 2


# Protection, and other refusals


def refuses(error, *parts):
    return pytest.raises(error, match="(?s)" + ".*".join(parts))


@pytest.mark.parametrize("name", ["head", "fc", "classifier", "logits", "output"])
def test_the_output_layer_is_known_by_its_name(name):
    params = {"a": {"kernel": PARAMS["head"]}, name: {"kernel": PARAMS["head"]}}
    thresholds = srigl(sparsity=0.5, layout=None).init(params).budgets.thresholds
    assert thresholds[name]["kernel"] == 0 < thresholds["a"]["kernel"]


@pytest.mark.parametrize(
    ("protect", "protected"),
    [
        ((), set()),
        ("conv", {"conv"}),
        (["conv", "^q"], {"conv", "query"}),
        (lambda path, leaf: leaf.ndim == 2, {"head"}),
    ],
)
def test_what_is_protected(protect, protected):
    thresholds = srigl(protect=protect).init(PARAMS).budgets.thresholds
    found = {path for path, own in thresholds.items() if (own == 0).all()}
    assert found == protected


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        (dict(gamma=-1), ValueError, ["srigl.gamma", "at least 0, got -1"]),
        (dict(gamma="0.3"), ValueError, ["srigl.gamma", "got '0.3'"]),
        (dict(protect="("), ValueError, ["protect=", "regular", "unterminated"]),
        (dict(protect=[3]), ValueError, ["protect=", "regular", "got 3"]),
        (dict(groups=3), TypeError, ["groups=", "channel_groups", "got int"]),
        (dict(groups=["fc"]), TypeError, ["groups=", "channel_groups"]),
        (dict(sparsity=1.0), ValueError, ["srigl.sparsity", "got 1.0"]),
    ],
)
def test_arguments_are_checked_at_once(options, error, parts):
    with refuses(error, *parts):
        srigl(**options)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (dict(protect="nothing"), ["'nothing' must match", "conv", "Correct"]),
        (dict(protect=lambda path, leaf: False), ["predicate", "output layer"]),
        (
            dict(sparsity=0.99, distribution="uniform"),
            ["every neuron", "conv would keep 3 for its 8", "where={'conv': "],
        ),
    ],
)
def test_trees_are_checked_at_init(options, parts):
    with refuses(ValueError, *parts):
        srigl(**options).init(PARAMS)


def test_an_unknown_output_layer_is_asked_for():
    params = {"layers": [{"kernel": PARAMS["head"]}]}
    with refuses(ValueError, "output layer", "layers/0/kernel", "protect=", r"\(\)"):
        srigl(layout=None).init(params)
    for options in (dict(protect=()), dict(gamma=0)):
        srigl(layout=None, **options).init(params)


# Groups


class Net(nnx.Module):
    """Convolutions with BatchNorm, one of them residual, and a linear hidden layer."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, rngs=rngs)
        self.conv2 = nnx.Conv(16, 16, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(16, rngs=rngs)
        self.hidden = nnx.Linear(16, 24, rngs=rngs)
        self.head = nnx.Linear(24, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(x + self.norm2(self.conv2(x)))
        return self.head(nnx.relu(self.hidden(x.mean(axis=(1, 2)))))


IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


@functools.cache
def groups_of_net():
    model = Net(nnx.Rngs(0))
    model.eval()
    return compaction.channel_groups(model, IMAGES)


@functools.cache
def trained_net():
    """Train on random images until neurons have died; return model and optimizer."""
    model = Net(nnx.Rngs(0))
    tx = sparse_optax.srigl(
        optax.adamw(3e-3),
        sparsity=0.8,
        gamma=0.9,
        groups=groups_of_net(),
        update_every=4,
        stop_at=36,
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(32, 8, 8, 3)), jnp.float32)
    classes = jnp.asarray(rng.integers(0, 4, 32))

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = model(images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
            return losses.mean()

        grads = nnx.grad(loss)(model)
        optimizer.update(model, grads)

    for _ in range(40):
        step(model, optimizer)
    model.eval()
    return model, optimizer


def by_path(tree):
    pure = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    leaves, _ = jax.tree.flatten_with_path(pure, is_leaf=lambda x: x is None)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}


def test_what_ablated_channels_emit_is_masked():
    model, optimizer = trained_net()
    masks = by_path(sparse_optax.get_masks(nnx.as_pure(optimizer.opt_state)))
    params = by_path(nnx.as_pure(nnx.state(model, nnx.Param)))
    live = lambda path: np.asarray(
        masks[path].any(axis=(0, 1, 2)[: masks[path].ndim - 1])
    )
    # The two convolutions add up to one stream; the other two have their own channels.
    stream = live("conv1/kernel") | live("conv2/kernel")
    vectors = {
        "conv1/bias": stream,
        "norm1/scale": stream,
        "norm1/bias": stream,
        "norm2/scale": stream,
        "norm2/bias": stream,
        "hidden/bias": live("hidden/kernel"),
    }
    assert {path for path, m in masks.items() if m is not None and m.ndim == 1} == {
        *vectors
    }
    assert masks["head/bias"] is None and live("head/kernel").all()
    for path, alive in vectors.items():
        np.testing.assert_array_equal(masks[path], alive, err_msg=path)
        assert (np.asarray(params[path])[~alive] == 0).all(), path
        slots = [
            by_path(slot)[path]
            for slot in nnx.as_pure(optimizer.opt_state).inner_state[0][1:]
        ]
        assert len(slots) == 2 and all((s[~alive] == 0).all() for s in slots)
    assert not live("hidden/kernel").all()


def test_compaction_removes_exactly_what_was_ablated():
    model, optimizer = trained_net()
    masks = by_path(sparse_optax.get_masks(nnx.as_pure(optimizer.opt_state)))
    small, report = compaction.compact(model, IMAGES)
    dead = {
        name: int((~masks[path]).sum())
        for name, path in (("conv1", "norm1/scale"), ("hidden", "hidden/bias"))
    }
    assert report.removed == {name: n for name, n in dead.items() if n}
    assert dead["hidden"] > 0
    assert small.hidden.out_features == 24 - dead["hidden"]
    assert report.max_error <= 1e-5 * max(report.scale, 1.0)


def test_masks_of_vectors_have_no_budget_and_show_in_the_summary():
    model = Net(nnx.Rngs(0))
    tx = sparse_optax.srigl(sparsity=0.5, groups=groups_of_net())
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    state = tx.init(params)
    weights = {
        path for path, n in by_path(state.budgets.weights).items() if n is not None
    }
    assert weights == {
        f"{name}/kernel" for name in ("conv1", "conv2", "hidden", "head")
    }
    table = analysis.summary(params, sparse_optax.get_masks(state))
    (row,) = (line.split() for line in table.split("\n") if "norm1/scale" in line)
    assert row[1:] == ["16", "16", "16", "100.00%"]


def test_groups_of_another_model_are_refused():
    other = models.MLP(5, (7,), 3, rngs=nnx.Rngs(0))
    report = compaction.channel_groups(other, jax.ShapeDtypeStruct((1, 5), jnp.float32))
    params = {"layers": [{"kernel": jnp.ones((5, 9))}, {"kernel": jnp.ones((9, 3))}]}
    with refuses(ValueError, "groups=", "7 indices", "layers/0/bias", "no such"):
        sparse_optax.srigl(sparsity=0.5, groups=report).init(params)


def test_a_channel_of_several_layers_dies_with_the_last_of_them():
    member = lambda path, axis, role: types.SimpleNamespace(
        path=path, axis=axis, role=role, channels=np.arange(4)
    )
    members = [member(p, 1, "producer") for p in ("a", "b")]
    group = types.SimpleNamespace(
        name="a", size=4, pinned=None, members=(*members, member("scale", 0, "norm"))
    )
    params = {"a": jnp.ones((6, 4)), "b": jnp.ones((6, 4)), "scale": jnp.ones(4)}
    tx = srigl(sparsity=0.8, layout=None, groups=[group], update_every=1)
    state = tx.init(params)
    alive = {
        "a": jnp.array([True, True, False, False]),
        "b": jnp.array([True, False, True, False]),
    }
    masks = {n: state.masks[n] & own[None] for n, own in alive.items()}
    state = state._replace(masks=state.masks | masks, count=jnp.int32(1))
    params = sparse_optax.apply_masks(params, state)
    grads = {n: own[None] * jnp.ones((6, 4)) for n, own in alive.items()}
    _, state = tx.update(grads | {"scale": jnp.ones(4)}, state, params)
    masks = sparse_optax.get_masks(state)
    for name, own in alive.items():
        np.testing.assert_array_equal(masks[name].any(axis=0), own)
    assert masks["scale"].tolist() == [True, True, True, False]
