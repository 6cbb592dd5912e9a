"""SRigL: fan-ins, ablation, what goes with ablated neurons, and compaction after it."""

import functools
import math

import jax
import jax.numpy as jnp
import network_shapes
import numpy as np
import optax
import oracles
import pytest
import srigl_oracle
from jax import lax

from sparsejax import sparse_optax
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
