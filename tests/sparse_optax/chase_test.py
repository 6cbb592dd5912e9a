"""Chase: whole runs against a slow loop in NumPy, and what it promises on the way."""

import functools
from types import SimpleNamespace

import chase_oracles
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import optax
import oracles
import pytest
import simulators
from jax import P, lax
from jax.sharding import AxisType, NamedSharding

from sparsejax import sparse_optax

STEPS = 30
SPARSITY = 0.85
SCHEDULE = dict(
    update_every=4, stop_soft_at=16, stop_at=28, remove_every=4, stop_removal_at=16
)
# Removal and exploration fall on one step now and then.
TOGETHER = SCHEDULE | dict(update_every=3, remove_every=5, stop_removal_at=18)
# There is one removal, long before removals end.
ONCE = SCHEDULE | dict(remove_every=12, stop_removal_at=20)
OF = {"apart": SCHEDULE, "together": TOGETHER, "once": ONCE}
MOMENTUM = optax.sgd(0.1, momentum=0.9)
OPTIONS = dict(soft_extra=0.1, drop_fraction=0.4, min_channels=0.5)


# A network: convolution, norm, convolution with bias, flattened into a matrix

SHAPES = {
    "conv1": (3, 3, 2, 8),
    "conv2": (3, 3, 8, 8),
    "fc": (16, 8),
    "head": (8, 4),
    "scale": (8,),
    "shift": (8,),
    "bias": (8,),
    "other": (4,),
}
SPARSE = ("conv1", "conv2", "fc", "head")
COUPLED = ("scale", "shift", "bias")


def group(name, *members):
    made = [
        SimpleNamespace(path=path, axis=axis, role=role, channels=np.array(index))
        for path, axis, role, index in members
    ]
    return SimpleNamespace(
        name=name, size=8, members=tuple(made), removable=np.ones(8, bool)
    )


EIGHT = range(8)
GROUPS = (
    group(
        "conv1",
        ("conv1", 3, "producer", EIGHT),
        ("scale", 0, "norm", EIGHT),
        ("shift", 0, "norm", EIGHT),
        ("mean", 0, "statistic", EIGHT),
        ("conv2", 2, "consumer", EIGHT),
    ),
    group(
        "conv2",
        ("conv2", 3, "producer", EIGHT),
        ("bias", 0, "norm", EIGHT),
        ("fc", 0, "consumer", [*EIGHT, *EIGHT]),
    ),
    group("fc", ("fc", 1, "producer", EIGHT), ("head", 0, "consumer", EIGHT)),
)


def build(inner=None, **options):
    given = dict(sparsity=SPARSITY, channel_sparsity=0.5, groups=GROUPS, skip=True)
    return sparse_optax.chase(inner, **given | OPTIONS | SCHEDULE | options)


def draw(seed, *leading):
    rng = np.random.default_rng(seed)
    return {p: np.float32(rng.normal(size=(*leading, *s))) for p, s in SHAPES.items()}


def scanned(tx, params, state, gradients):
    """Train; return what every step leaves: parameters and state."""

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state)

    return lax.scan(step, (params, state), gradients)[1]


@functools.cache
def run(name, channel_sparsity=0.5):
    """Return parameters and state before the first step, and after every step."""
    tx = build(MOMENTUM, channel_sparsity=channel_sparsity, **OF[name])
    params = draw(0)
    state = tx.init(params)
    params = sparse_optax.apply_masks(params, state)
    history = jax.jit(functools.partial(scanned, tx))(params, state, draw(1, STEPS))
    at = lambda i: jax.tree.map(lambda x: np.asarray(x)[i], history)
    return (params, jax.device_get(state)), [at(i) for i in range(STEPS)]


RUNS = [
    ("apart", 0.5),
    pytest.param("apart", 0.3, marks=pytest.mark.slow),
    pytest.param("apart", 0.0, marks=pytest.mark.slow),
    ("together", 0.5),
    pytest.param("once", 0.5, marks=pytest.mark.slow),
]
each_run = pytest.mark.parametrize(("name", "channel_sparsity"), RUNS)


@each_run
def test_a_run_equals_the_simulation_at_every_step(name, channel_sparsity):
    (params, state), history = run(name, channel_sparsity)
    gradients = draw(1, STEPS)
    simulation = chase_oracles.chase(
        params,
        {path: state.masks[path] for path in SHAPES},
        GROUPS,
        lambda step, _: {path: g[step] for path, g in gradients.items()},
        simulators.Sgd(0.1, 0.9),
        STEPS,
        sparse=SPARSE,
        channel_sparsity=channel_sparsity,
        **OPTIONS | OF[name],
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    for (params, state), (expected, live) in zip(history, simulation, strict=True):
        for path, mask in expected.masks.items():
            np.testing.assert_array_equal(state.masks[path], mask)
        jax.tree.map(np.testing.assert_array_equal, state.budgets.live, tuple(live))
        jax.tree.map(close, params, expected.weights)
        trace = optax.tree.get(state.inner_state, "trace")
        jax.tree.map(close, trace, expected.slots["trace"])


def explorations(name):
    every, stop_at = OF[name]["update_every"], OF[name]["stop_at"]
    return [t for t in range(every, stop_at) if t % every == 0]


def removals(name):
    s = OF[name]
    return chase_oracles.removals(
        s["update_every"], s["remove_every"], s["stop_removal_at"]
    )


def active(state):
    return sum(int(state.masks[path].sum()) for path in SPARSE)


@each_run
def test_counts_are_those_of_the_schedule(name, channel_sparsity):
    (_, start), history = run(name, channel_sparsity)
    kept = oracles.erk({p: SHAPES[p][::-1] for p in SPARSE}, SPARSITY)
    budget, size = sum(kept.values()), sum(int(np.prod(SHAPES[p])) for p in SPARSE)
    assert {p: int(start.masks[p].sum()) for p in SPARSE} == kept
    last = removals(name)[-1]
    floors = [int(8 * (1 - channel_sparsity) * OPTIONS["min_channels"])] * 3
    for step, (_, state) in enumerate(history):
        live = [int(one.sum()) for one in state.budgets.live]
        assert all(n >= floor for n, floor in zip(live, floors, strict=True))
        if step in removals(name):
            at = OF[name]["stop_removal_at"] if step == last else step
            end = OF[name]["stop_removal_at"]
            keeps = chase_oracles.channels_kept(24, channel_sparsity, end, at)
            assert sum(live) == keeps
        if step in explorations(name):
            soft = step < OF[name]["stop_soft_at"]
            end = OF[name]["stop_soft_at"]
            extra = chase_oracles.half_cosine(0.1, 0.0, end, step) if soft else 0
            alive = sum(int(alive_at(state)[path].sum()) for path in SPARSE)
            assert active(state) == min(budget + int(size * extra), alive)
        assert active(state) <= budget + int(size * OPTIONS["soft_extra"])
    assert sum(live) == int(24 * (1 - channel_sparsity))


def alive_at(state):
    """Return where weights may be active, by path."""
    found = {path: np.ones(s, bool) for path, s in SHAPES.items()}
    for one, live in zip(GROUPS, state.budgets.live, strict=True):
        for member in one.members:
            if member.path in found:
                dead = ~live[member.channels]
                found[member.path][(slice(None),) * member.axis + (dead,)] = False
    return found


@each_run
def test_removed_channels_never_return_and_take_all_with_them(name, channel_sparsity):
    (_, before), history = run(name, channel_sparsity)
    assert all(before.masks[path].all() for path in COUPLED)
    assert before.masks["other"] is None
    for step, (params, state) in enumerate(history):
        alive = alive_at(state)
        pairs = zip(before.budgets.live, state.budgets.live, strict=True)
        changed = [(old != new).any() for old, new in pairs]
        jax.tree.map(
            lambda old, new: np.testing.assert_array_equal(new & old, new),
            before.budgets.live,
            state.budgets.live,
        )
        assert not any(changed) or step in removals(name)
        for path in COUPLED:
            np.testing.assert_array_equal(state.masks[path], alive[path])
        for path in (*SPARSE, *COUPLED):
            assert not (state.masks[path] & ~alive[path]).any()
            trace = optax.tree.get(state.inner_state, "trace")
            for x in (params[path], trace[path]):
                assert (x[~state.masks[path]] == 0).all()
        before = state


@each_run
def test_masks_change_on_schedule_alone_and_growth_starts_from_nothing(
    name, channel_sparsity
):
    """Survivors go on; what grew has a larger gradient than what could have grown."""
    (_, before), history = run(name, channel_sparsity)
    gradients, changed, freed = draw(1, STEPS), [], []
    for step, (params, state) in enumerate(history):
        masks = {path: state.masks[path] for path in (*SPARSE, *COUPLED)}
        if any((masks[path] != before.masks[path]).any() for path in masks):
            changed.append(step)
        freed.append(active(before) - active(state))
        alive = alive_at(state)
        grown, left = [], []
        for path in SPARSE:
            gradient = np.abs(gradients[path][step])
            new = masks[path] & ~before.masks[path]
            np.testing.assert_allclose(
                params[path][new], -0.1 * gradients[path][step][new], rtol=1e-5
            )
            grown.append(gradient[new])
            left.append(gradient[alive[path] & ~masks[path]])
        grown, left = np.concatenate(grown), np.concatenate(left)
        assert not grown.size or not left.size or grown.min() >= left.max()
        before = state
    due = [*explorations(name), *(removals(name) if channel_sparsity else ())]
    soft = [t for t in explorations(name) if t < OF[name]["stop_soft_at"]]
    # A late update drops few weights, and they may grow again at once.
    assert set(soft) <= set(changed) <= set(due)
    if channel_sparsity and name == "apart":
        # What removal frees is allotted again by the next exploration.
        assert all(freed[t] > 0 > freed[t + 2] for t in removals(name)[:2])


# The criteria, the scope


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["wmm", "channel_density", "kernel_density"])
def test_other_criteria_rank_otherwise(criterion):
    step = removals("apart")[0]
    tx = build(optax.sgd(0.0), criterion=criterion, soft_extra=0.0)
    params = draw(0)
    state = tx.init(params)
    masks = jax.device_get(state.masks)
    spatial = {path: len(SHAPES[path]) - 2 for path in SPARSE}
    updates, after = tx.update(params, state._replace(count=jnp.int32(step)), params)
    scores = [chase_oracles.score(g, params, masks, criterion, spatial) for g in GROUPS]
    keep = chase_oracles.channels_kept(24, 0.5, SCHEDULE["stop_removal_at"], step)
    scores = [np.float32(one) for one in scores]
    expected = chase_oracles.remove(scores, [np.ones(8, bool)] * 3, keep, [2] * 3)
    jax.tree.map(np.testing.assert_array_equal, after.budgets.live, tuple(expected))


def test_layers_can_keep_to_their_own_budgets():
    tx = build(optax.sgd(0.1), scope="layer", channel_sparsity=0.0)
    params = draw(0)
    state = tx.init(params)
    history = jax.jit(functools.partial(scanned, tx))(params, state, draw(1, STEPS))
    masks = jax.device_get(history[1].masks)
    kept = oracles.erk({p: SHAPES[p][::-1] for p in SPARSE}, SPARSITY)
    sizes = {p: int(np.prod(SHAPES[p])) for p in SPARSE}
    budget, size = sum(kept.values()), sum(sizes.values())
    for path in SPARSE:
        extra = chase_oracles.half_cosine(0.1, 0.0, 16, 4) * size / budget
        soft = min(kept[path] + int(kept[path] * extra), sizes[path])
        assert [int(masks[path][t].sum()) for t in (0, 4, 16, 29)] == [
            kept[path],
            soft,
            kept[path],
            kept[path],
        ]
        assert (masks[path][16] != masks[path][20]).any() or kept[path] == sizes[path]


def test_between_events_nothing_is_ranked():
    """Check it under vmap, with steps that differ, where a select could stand in."""
    tx = build(MOMENTUM)
    params = draw(0, 3)
    states = jax.vmap(tx.init)(params)
    update = jax.vmap(tx.update)
    outside, inside = jaxprs.outside_and_inside(update, params, states, params)
    assert "cond" in outside and {"sort", "while"} <= inside
    assert not {"while", "scan", "sort", "reduce", "gather", "dot_general"} & outside


# Many settings and many devices


def test_vmap_over_channel_sparsity_compiles_once():
    settings = (0.0, 0.3, 0.5)
    params = sparse_optax.apply_masks(draw(0), build(MOMENTUM).init(draw(0)))
    states = [build(MOMENTUM, channel_sparsity=s).init(params) for s in settings]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    together = jax.jit(
        jax.vmap(functools.partial(scanned, build(MOMENTUM)), in_axes=(None, 0, None))
    )
    found, state = jax.device_get(together(params, stacked, draw(1, STEPS)))
    assert together._cache_size() == 1
    for i, channel_sparsity in enumerate(settings):
        _, history = run("apart", channel_sparsity)
        for step, (_, expected) in enumerate(history):
            at = lambda x, i=i, step=step: x[i, step]
            mine = jax.tree.map(at, (state.masks, state.budgets.live))
            jax.tree.map(
                np.testing.assert_array_equal,
                mine,
                (expected.masks, expected.budgets.live),
            )
    live = [sum(int(one[i, -1].sum()) for one in state.budgets.live) for i in range(3)]
    assert live == [24, 16, 12]


SPECS = {
    "conv1": P(None, None, None, "x"),
    "conv2": P(None, None, "x"),
    "fc": P("x"),
    "head": P("x"),
    "bias": P("x"),
}


@pytest.mark.parametrize(
    ("scope", "axis"), [("global", AxisType.Auto), ("layer", AxisType.Explicit)]
)
def test_on_a_mesh_masks_are_the_same(scope, axis):
    """The numbers are such that float32 adds them exactly."""
    short = dict(update_every=2, remove_every=2, stop_removal_at=4, stop_soft_at=4)
    tx = build(optax.sgd(0.25, momentum=0.5), scope=scope, **short, stop_at=8)
    rng = np.random.default_rng(2)
    grid = lambda *lead: {
        p: np.float32(rng.integers(-8, 9, (*lead, *s))) / 2 for p, s in SHAPES.items()
    }
    params, gradients = grid(), grid(7)
    alone = jax.jit(functools.partial(scanned, tx))(params, tx.init(params), gradients)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis,))
    shardings = {p: NamedSharding(mesh, SPECS.get(p, P())) for p in SHAPES}
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings)
        state = tx.init(params)
        update = jax.jit(tx.update)
        for step in range(7):
            grads = {path: g[step] for path, g in gradients.items()}
            grads = jax.device_put(grads, shardings)
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
    last = jax.tree.map(lambda x: x[-1], alone)
    found = params, state.masks, state.budgets
    jax.tree.map(
        np.testing.assert_array_equal, found, (last[0], last[1].masks, last[1].budgets)
    )
    assert sum(int(one.sum()) for one in state.budgets.live) == 12


# Bad input

PARAMS = {path: jnp.ones(shape) for path, shape in SHAPES.items()}
REFUSED = [
    (dict(channel_sparsity=1.0), ValueError, r"channel_sparsity=\.\.\.\).*\[0, 1\)"),
    (dict(groups=3), TypeError, r"groups=\.\.\.\).*channel_groups.*got int"),
    (dict(groups=()), ValueError, "needs groups.*none in groups=.*skip=True"),
    (dict(groups=GROUPS[1:2], skip=False), ValueError, "needs groups"),
    (dict(criterion="random"), ValueError, "criterion.*'umm'.*'random'"),
    (dict(scope="all"), ValueError, "scope.*'global', 'layer'.*'all'"),
    (dict(min_channels=1.5), ValueError, r"min_channels.*\[0, 1\].*1.5"),
    (dict(soft_extra="much"), ValueError, r"soft_extra.*\[0, 1\].*'much'"),
    (dict(drop_fraction=-1), ValueError, r"drop_fraction.*\[0, 1\].*-1"),
    (dict(remove_every=0), ValueError, "remove_every.*at least 1, got 0"),
    (dict(stop_removal_at=29), ValueError, "stop_removal_at.*after stop_at=28.*29"),
    (dict(stop_removal_at=2), ValueError, "needs a removal.*before step 2.*lower"),
    (dict(stop_soft_at=25), ValueError, "stop_soft_at.*last update, at 24.*got 25"),
    (dict(stop_at=None, stop_removal_at=None), ValueError, "needs stop_removal_at="),
]


@pytest.mark.parametrize(("options", "error", "match"), REFUSED)
def test_arguments_that_cannot_be_meant_are_refused(options, error, match):
    with pytest.raises(error, match=f"(?s)chase.*{match}"):
        build(**options)


def test_groups_of_another_model_are_refused():
    without = {path: x for path, x in PARAMS.items() if path != "bias"}
    with pytest.raises(ValueError, match="conv2.*axis 0 of bias.*no such parameter"):
        build().init(without)
    other = PARAMS | {"scale": jnp.ones(9)}
    with pytest.raises(ValueError, match=r"conv1.*8 indices.*scale.*shape \(9,\)"):
        build().init(other)


def test_the_schedule_has_defaults_that_end_within_the_budget():
    """Of 10 steps removal may take 8, and an update at 8 is the last."""
    options = dict(stop_at=10, stop_removal_at=None, stop_soft_at=None)
    tx, params = build(optax.sgd(0.1), **options), draw(0)
    state = tx.init(params)
    budget, size = active(state), sum(state.masks[path].size for path in SPARSE)
    _, states = jax.jit(functools.partial(scanned, tx))(params, state, draw(1, 10))
    at = lambda step: active(jax.tree.map(lambda x: x[step], states))
    assert [at(4), at(8), at(9)] == [budget + size // 20, budget, budget]
    assert [int(live[-1].sum()) for live in states.budgets.live] != [8, 8, 8]
    assert sum(int(live[-1].sum()) for live in states.budgets.live) == 12
