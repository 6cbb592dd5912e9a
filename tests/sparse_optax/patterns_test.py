"""Patterns inside the algorithms: what is kept, what changes, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax import lax

from sparsejax import schedules, sparse_optax
from sparsejax.masks import NM, Block, Layout

STEPS = 9
SHAPES = {"conv": (3, 3, 8, 4), "fc": (16, 12), "stack": (3, 8, 6)}
LAYOUT = {"stack": Layout(batch=(0,))}
INPUT_AXIS = {"conv": 2, "fc": 0, "stack": 1}
DROP = dict(update_every=2, stop_at=8, drop_fraction=schedules.constant_drop(0.4))
ALGORITHMS = {
    "static": (sparse_optax.static, ()),
    "set": (functools.partial(sparse_optax.set, **DROP), (2, 4, 6)),
    "rigl": (functools.partial(sparse_optax.rigl, **DROP), (2, 4, 6)),
    "magnitude": (
        functools.partial(
            sparse_optax.magnitude, start_at=2, update_every=2, stop_at=8
        ),
        (4, 6),  # at its first step the schedule has not left the dense network
    ),
}
FIRST, LAST = 2, 6


def draw(seed, shapes=SHAPES, *lead):
    rng = np.random.default_rng(seed)
    return {n: np.float32(rng.normal(size=(*lead, *s))) for n, s in shapes.items()}


def train(tx, params, gradients):
    """Return weights and masks before the first step and after every one."""

    @jax.jit
    def run(params, state, gradients):
        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, sparse_optax.get_masks(state))

        return lax.scan(step, (params, state), gradients)[1]

    state = tx.init(params)
    start = sparse_optax.apply_masks(params, state), sparse_optax.get_masks(state)
    history = jax.device_get(run(*start[:1], state, gradients))
    at = lambda i: jax.tree.map(lambda x: x[i], history)
    return [jax.device_get(start), *(at(i) for i in range(STEPS))]


def group_counts(mask, axis, m):
    """Count what is active in every group of ``m`` along an axis."""
    rows = np.moveaxis(mask, axis, -1)
    return rows.reshape(*rows.shape[:-1], -1, m).sum(axis=-1)


def block_sums(x, axis, block):
    """Add within blocks; neurons lie along the last axis, inputs along ``axis``."""
    *rest, neurons = x.shape
    rest[axis : axis + 1] = rest[axis] // block.inputs, block.inputs
    shape = (*rest, neurons // block.neurons, block.neurons)
    return x.reshape(shape).sum(axis=(axis + 1, -1))


def active_of(size, kept, name, after):
    """Return how many of ``size`` are active when ``after`` steps are done."""
    if name != "magnitude":
        return kept
    done = [event for event in ALGORITHMS[name][1] if event < after]
    progress = oracles.cubic_progress(done[-1], FIRST, LAST) if done else 0
    return size - int((size - kept) * progress)


# What is kept


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_group_has_n_of_m_after_every_step(name):
    factory, events = ALGORITHMS[name]
    # Without a step of the optimizer a survivor is what it was.
    tx = factory(optax.sgd(0.0), sparsity=0.75, pattern=NM(2, 8), layout=LAYOUT)
    history = train(tx, draw(0), draw(1, SHAPES, STEPS))
    changed = []
    for after, (_, masks) in enumerate(history):
        expected = active_of(8, 2, name, after)
        for path, mask in masks.items():
            counts = group_counts(mask, INPUT_AXIS[path], 8)
            np.testing.assert_array_equal(counts, expected)
        if after:
            check_survivors(*history[after - 1], *history[after])
            before = history[after - 1][1]
            changed += [after - 1] * any((masks[p] != before[p]).any() for p in masks)
    assert tuple(changed) == events


def check_survivors(old_params, old_masks, params, masks):
    for path, mask in masks.items():
        stays = mask & old_masks[path]
        np.testing.assert_array_equal(params[path][stays], old_params[path][stays])
        assert (params[path][~stays] == 0).all()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_blocks_change_as_the_weights_of_a_smaller_network(name):
    """The sums of blocks, seen as weights and gradients, give the masks of blocks."""
    factory, events = ALGORITHMS[name]
    block = Block(neurons=2, inputs=4)
    options = dict(sparsity=0.5, distribution="uniform", layout=LAYOUT)
    sums = lambda tree, lead=0: {
        path: block_sums(abs(x), INPUT_AXIS[path] + lead, block)
        for path, x in tree.items()
    }
    quarters = lambda tree: jax.tree.map(lambda x: np.round(4 * x) / 4, tree)
    params, gradients = quarters(draw(0)), quarters(draw(1, SHAPES, STEPS))
    tx = factory(optax.sgd(0.0), pattern=block, **options)
    history = train(tx, params, gradients)
    small = train(
        factory(optax.sgd(0.0), **options), sums(params), sums(gradients, lead=1)
    )
    changes = 0
    for after, ((now, masks), (small_now, chosen)) in enumerate(
        zip(history, small, strict=True)
    ):
        for path in SHAPES:
            areas = block_sums(masks[path], INPUT_AXIS[path], block)
            np.testing.assert_array_equal(areas, 8 * chosen[path])
        jax.tree.map(np.testing.assert_array_equal, sums(now), small_now)
        if after:
            check_survivors(*history[after - 1], now, masks)
            changes += any(
                (masks[path] != history[after - 1][1][path]).any() for path in masks
            )
    assert changes == len(events)


def test_groups_leave_the_distribution_and_blocks_take_whole_shares():
    pattern = {"conv": NM(1, 4), "^fc": Block(neurons=4, inputs=8)}
    tx = sparse_optax.static(sparsity=0.7, pattern=pattern, layout=LAYOUT)
    masks = sparse_optax.get_masks(tx.init(draw(0)))
    layers = {"fc": (12, 16), **{f"stack[{i}]": (6, 8) for i in range(3)}}
    kept = oracles.erk(layers, 0.7)
    np.testing.assert_array_equal(group_counts(masks["conv"], 2, 4), 1)
    assert int(masks["fc"].sum()) == kept["fc"] // 32 * 32 > 0
    stacked = [kept[f"stack[{i}]"] for i in range(3)]
    assert masks["stack"].sum(axis=(1, 2)).tolist() == stacked


def test_a_share_smaller_than_a_block_is_one_block():
    tx = sparse_optax.static(sparsity=0.95, pattern={"fc": Block(4, 16)}, layout=LAYOUT)
    state = tx.init(draw(0))
    assert int(sparse_optax.get_masks(state)["fc"].sum()) == 64
    assert int(state.budgets["fc"]) == 64


def test_n_of_all_is_an_active_mask():
    tx = sparse_optax.rigl(optax.sgd(0.0), sparsity=0, pattern=NM(4, 4), **DROP)
    for _, masks in train(tx, draw(0), draw(1, SHAPES, STEPS)):
        assert all(mask.all() for mask in masks.values())


def test_one_vmap_runs_several_n():
    """The budgets in the state say which ``n``, whatever the transformation says."""
    make = lambda n: sparse_optax.rigl(
        optax.sgd(0.1), sparsity=1 - n / 4, pattern=NM(n, 4), **DROP
    )
    params, gradients = draw(0), draw(1, SHAPES, STEPS)
    states = jax.tree.map(
        lambda *x: jnp.stack(x), *(make(n).init(params) for n in (1, 3))
    )

    def run(tx, state):
        def step(carry, grads):
            updates, state = tx.update(grads, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        (_, state), _ = lax.scan(step, (params, state), gradients)
        return sparse_optax.get_masks(state)

    together = jax.jit(jax.vmap(functools.partial(run, make(2))))(states)
    for i, n in enumerate((1, 3)):
        alone = jax.jit(functools.partial(run, make(n)))(make(n).init(params))
        for path, mask in together.items():
            np.testing.assert_array_equal(mask[i], alone[path])
            np.testing.assert_array_equal(group_counts(mask[i], INPUT_AXIS[path], 4), n)


# What is refused

PARAMS = {"stem": jnp.ones((3, 3, 3, 8)), "fc": jnp.ones((8, 6))}
RANDOM = ["static", "set", "rigl", "magnitude"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            dict(sparsity=0.9, pattern=NM(2, 4)),
            ValueError,
            r"\(sparsity=...\) must be that of pattern=NM\(n=2, m=4\), 1 - 2/4 = 0.5, "
            "got 0.9.* dict from regex",
        ),
        (dict(pattern="2:4"), TypeError, r"\(pattern=...\) must be .*, got '2:4'"),
        (dict(pattern={"fc": 4}), TypeError, r"\(pattern={'fc': ...}\) .* got 4"),
        (dict(pattern={"(": None}), ValueError, r"\(pattern=...\): keys are regular"),
    ],
)
@pytest.mark.parametrize("name", RANDOM)
def test_arguments(name, options, error, message):
    with pytest.raises(error, match=name + message):
        getattr(sparse_optax, name)(**{"sparsity": 0.5, **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            dict(pattern=NM(2, 4)),
            ValueError,
            "for stem: NM.* 4 inputs must divide .* length 3 .* where=",
        ),
        (dict(pattern={"head": Block(2, 2)}), ValueError, "'head' .* matches none"),
        (
            dict(pattern={"fc": NM(2, 4)}, where={"fc": 0.5}),
            ValueError,
            r"NM\(n=2, m=4\) says how sparse fc is, .* where={...: 0.5}",
        ),
        (dict(pattern=lambda path, shape: 2), TypeError, "pattern= for .* got 2"),
    ],
)
@pytest.mark.parametrize("name", RANDOM)
def test_parameters(name, options, error, message):
    tx = getattr(sparse_optax, name)(sparsity=0.5, **options)
    with pytest.raises(error, match=message):
        tx.init(PARAMS)


def test_what_has_no_use_for_a_pattern():
    with pytest.raises(ValueError, match='scope="layer" with pattern=Block'):
        sparse_optax.magnitude(sparsity=0.5, scope="global", pattern=Block(2, 2))
    masks = {"fc": jnp.ones((8, 6), bool)}
    with pytest.raises(ValueError, match="and pattern= are for a random mask"):
        sparse_optax.static(masks=masks, pattern=NM(2, 4))


def test_two_thirds_agree_with_one_of_three():
    for sparsity in (2 / 3, 1 - 1 / 3):
        tx = sparse_optax.set(sparsity=sparsity, pattern=NM(1, 3), where={"fc": 0})
        mask = sparse_optax.get_masks(tx.init(PARAMS))["stem"]
        np.testing.assert_array_equal(mask.sum(axis=2), 1)
