"""Rounds of training, pruning and rewinding, and their checkpoints."""

import functools

import chex
import jax
import jax.numpy as jnp
import lottery_oracles as oracles
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from sparsejax import lottery, masks, sparse_optax

STEPS, EARLY = 6, 2
PRUNED = ("layers/0", "layers/1")


def inner(penalty=0.01):
    return optax.chain(
        optax.add_decayed_weights(penalty), optax.sgd(0.05, momentum=0.9)
    )


def network(seed=0):
    """Return a state: two layers to prune, a stem and a head, and running means."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)
    params = {
        "stem": draw(4, 6),
        "layers": [draw(6, 6), draw(6, 6)],
        "head": {"kernel": draw(6, 2), "bias": draw(2)},
    }
    return {"params": params, "mean": jnp.zeros(6), "key": jax.random.key(1)}


def prunable(path, leaf):
    return path.startswith("layers")


@functools.partial(jax.jit, donate_argnums=0)
def step(state, opt_state):
    """Take one step on random data, and keep the running mean of a layer's outputs."""
    key, data = jax.random.split(state["key"])
    x = jax.random.normal(data, (8, 4))

    def loss_fn(params):
        hidden = jnp.tanh(x @ params["stem"])
        for kernel in params["layers"]:
            hidden = jnp.tanh(hidden @ kernel)
        y = hidden @ params["head"]["kernel"] + params["head"]["bias"][None]
        return jnp.mean((y - x[:, :2]) ** 2), jnp.mean(hidden, axis=0)

    grads, mean = jax.grad(loss_fn, has_aux=True)(state["params"])
    tx = sparse_optax.static(inner(), sparsity=0.0)  # masks are in the state
    updates, opt_state = tx.update(grads, opt_state, state["params"])
    params = optax.apply_updates(state["params"], updates)
    mean = 0.9 * state["mean"] + 0.1 * mean
    return {"params": params, "mean": mean, "key": key}, opt_state


class Trainer:
    """Trains in place, and remembers what it was given."""

    def __init__(self, early=EARLY):
        self.early, self.given, self.slots = early, [], []

    def __call__(self, state, own, index):
        self.given.append(jax.device_get(as_data(state)))
        opt_state = sparse_optax.static(inner(), masks=own).init(state["params"])
        snapshot = None
        for number in range(STEPS):
            if index == 0 and number == self.early:
                snapshot = jax.tree.map(lambda x: x.copy(), state)
            state, opt_state = step(state, opt_state)
        self.slots.append(optax.tree.get(opt_state, "trace"))
        return state, snapshot


def as_data(state):
    return {**state, "key": jax.random.key_data(state["key"])}


def run(train, state=None, **options):
    options = {"rounds": 3, "where": prunable} | options
    return lottery.iterative_magnitude_pruning(
        train,
        network() if state is None else state,
        params_of=lambda state: state["params"],
        **options,
    )


@pytest.fixture(scope="module")
def experiment():
    train = Trainer()
    return train, list(run(train))


def flat(tree):
    """Return the values of the pruned leaves in one row, in tree order."""
    return np.concatenate([np.ravel(leaf) for leaf in tree["layers"]])


def test_masks_shrink_by_one_global_threshold(experiment):
    _, rounds = experiment
    assert [r.index for r in rounds] == [0, 1, 2, 3]
    assert flat(rounds[0].masks).all()
    active = 72
    for before, after in zip(rounds, rounds[1:], strict=False):
        expected = oracles.pruned(flat(before.masks), flat(before.state["params"]), 0.2)
        np.testing.assert_array_equal(flat(after.masks), expected)
        active -= round(0.2 * active)
        assert flat(after.masks).sum() == active
    for r in rounds:
        assert r.masks["stem"] is None
        assert r.masks["head"] == {"kernel": None, "bias": None}
        assert (flat(r.state["params"])[~flat(r.masks)] == 0).all()


def test_every_later_round_starts_from_the_snapshot_bit_by_bit(experiment):
    train, rounds = experiment
    chex.assert_trees_all_equal(train.given[0], jax.device_get(as_data(network())))
    assert (np.asarray(rounds[0].snapshot["mean"]) != 0).any()
    snapshot = jax.device_get(as_data(rounds[0].snapshot))
    for r, start in zip(rounds[1:], train.given[1:], strict=True):
        chex.assert_trees_all_equal(start, snapshot)
        assert r.snapshot is rounds[0].snapshot
    assert (flat(rounds[0].snapshot["params"]) != 0).all()


def test_momentum_stays_empty_off_the_masks(experiment):
    train, rounds = experiment
    for r, slots in zip(rounds, train.slots, strict=True):
        assert (flat(slots)[~flat(r.masks)] == 0).all()
        assert (flat(slots)[flat(r.masks)] != 0).all()


def test_without_a_snapshot_rounds_go_back_to_the_start():
    train = Trainer(early=None)
    list(run(train, rounds=1))
    chex.assert_trees_all_equal(train.given[1], jax.device_get(as_data(network())))


def test_layers_are_pruned_apart():
    rounds = list(run(Trainer(), rounds=1, scope="layer", rate=0.3))
    for i in range(2):
        weights = np.ravel(rounds[0].state["params"]["layers"][i])
        expected = oracles.pruned(np.ones(36, bool), weights, 0.3)
        np.testing.assert_array_equal(np.ravel(rounds[1].masks["layers"][i]), expected)


def test_any_round_can_be_resumed_from(experiment, tmp_path):
    _, rounds = experiment
    restore = functools.partial(
        lottery.restore_round,
        tmp_path,
        jax.eval_shape(network),
        params_of=lambda state: state["params"],
    )
    assert restore() is None
    for r in rounds:
        lottery.save_round(tmp_path, r)
    same = lambda a, b: chex.assert_trees_all_equal(
        *[
            [r.index, r.masks, as_data(r.state), as_data(r.snapshot)]
            for r in jax.device_get((a, b))
        ]
    )
    same(restore(), rounds[3])
    for index in (0, 1):
        stored = restore(index=index)
        same(stored, rounds[index])
        later = list(run(Trainer(), network(seed=9), resume=stored, rounds=2))
        assert len(later) == 2 - index
        for found, expected in zip(later, rounds[index + 1 :], strict=False):
            same(found, expected)
    assert list(run(Trainer(), resume=restore(index=3))) == []
    with pytest.raises(ValueError, match="where= selects, .* for layers/1; pass the"):
        run(Trainer(), resume=restore(index=1), where=lambda path, _: "0" in path)


def test_rounds_are_never_overwritten_nor_taken_for_another(experiment, tmp_path):
    _, rounds = experiment
    lottery.save_round(tmp_path, rounds[1])
    with pytest.raises(FileExistsError, match="has a round 1"):
        lottery.save_round(tmp_path, rounds[1])
    state = jax.eval_shape(network)
    params_of = lambda state: state["params"]
    restore = functools.partial(lottery.restore_round, tmp_path, params_of=params_of)
    with pytest.raises(ValueError, match="has no round 0; it has 1"):
        restore(state, 0)
    other = {**state, "mean": jax.ShapeDtypeStruct((7,), jnp.float32)}
    message = r"mean of its state is float32\[6\], and float32\[7\] in state="
    with pytest.raises(ValueError, match=message):
        restore(other)
    with pytest.raises(ValueError, match="another params_of"):
        lottery.restore_round(tmp_path, state)
    with ocp.training.Checkpointer(str(tmp_path / "foreign")) as foreign:
        foreign.save_checkpointables(0, {"state": {"w": jnp.ones(2)}}, force=True)
    with pytest.raises(ValueError, match="Round 0 .*save_round did not write it"):
        lottery.restore_round(tmp_path / "foreign", state)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda s: s, TypeError, "must return a pair"),
        (lambda s: (s["params"], None), ValueError, "must be a state like the first"),
        (lambda s: (s, s["params"]), ValueError, "the snapshot of round 0 must be"),
        (
            lambda s: ({**s, "mean": jnp.zeros(3)}, None),
            ValueError,
            r"index=0\).* mean is \(\(3,\), 'float32'\) in it instead of \(\(6,\)",
        ),
        (lambda s: (s, None), ValueError, r"index=1\) must leave .* of layers/0"),
    ],
)
def test_train_functions_that_do_something_else_are_refused(returned, error, message):
    with pytest.raises(error, match=message):
        list(run(lambda state, own, index: returned(state), rounds=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": -1}, "rounds=.*at least 0, got -1"),
        ({"rounds": 2.0}, "rounds=.*integer"),
        ({"rate": 1.0}, r"rate=.*\[0, 1\), got 1.0"),
        ({"scope": "all"}, 'scope=.*"global" or "layer"'),
        ({"where": {"layers": 0.5}}, "where=.*at one rate="),
        ({"where": {"conv": 0}}, "the pattern 'conv' must match"),
        (
            {"resume": lottery.Round(0, {}, {}, {"w": jnp.ones(2)})},
            "resume=.* must be a state like the first one",
        ),
    ],
)
def test_bad_arguments_are_refused_before_training(options, message):
    with pytest.raises(ValueError, match=message):
        run(None, **options)


prune = jax.jit(lottery.prune, static_argnames="scope")


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.2, 0.25, 0.5, 0.99]))
def test_prune_is_that_of_the_oracle(seed, rate):
    rng = np.random.default_rng(seed)
    shapes = {"layers": [(3, 4), (2, 5)]}
    draw = lambda f: {"layers": [f(shape) for shape in shapes["layers"]]}
    own = draw(lambda shape: rng.random(shape) < 0.7)
    weights = draw(lambda shape: np.round(rng.normal(size=shape), 1).astype("f"))
    found = prune(own, weights, rate=rate)
    expected = oracles.pruned(flat(own), flat(weights), rate)
    np.testing.assert_array_equal(flat(found), expected)
    found = prune(own, weights, rate=rate, scope="layer")
    for i in range(2):
        expected = oracles.pruned(
            np.ravel(own["layers"][i]), np.ravel(weights["layers"][i]), rate
        )
        np.testing.assert_array_equal(np.ravel(found["layers"][i]), expected)


def test_stacked_layers_are_pruned_apart():
    weights = {"kernel": np.float32([[[1, 2], [3, 4]], [[50, 60], [70, 80]]])}
    own = {"kernel": np.ones((2, 2, 2), bool)}
    layout = {"kernel": masks.Layout(batch=(0,))}
    found = jax.jit(functools.partial(lottery.prune, scope="layer", layout=layout))(
        own, weights, rate=0.5
    )
    np.testing.assert_array_equal(found["kernel"], [[[False, False], [True, True]]] * 2)
