"""Ghost neurons in functions as they are: what is replaced, and what must not be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import P, lax
from jax.sharding import AxisType

from sparsejax import recipes

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)) * 2, jnp.float32)


def while_loop(act):
    def f(x):
        turn = lambda now: (now[0] + 1, act(now[1] - 0.1))
        return lax.while_loop(lambda now: now[0] < 3, turn, (0, x))[1]

    return f


def scan(act):
    def f(x):
        step = lambda carry, row: (act(carry - row), act(row))
        return lax.scan(step, x[0], x, reverse=True)

    return f


# Each takes an activation and returns a function that has it somewhere.
PLACES = {
    "plain": lambda act: lambda x: act(x) * 2,
    "jit": lambda act: jax.jit(lambda x: jax.jit(act)(x - 0.1)),
    "checkpoint": lambda act: jax.checkpoint(lambda x: jnp.sin(act(x))),
    "cond": lambda act: lambda x: lax.cond(x.sum() < 100, act, jnp.sin, x),
    "scan": scan,
    "while": while_loop,
    "vmap": lambda act: jax.vmap(act),
}
RELUS = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "max (x, 0)": lambda x: jnp.maximum(x, 0),
    "max (0, x)": lambda x: jnp.maximum(0.0, x),
    "max of zeros": lambda x: jnp.maximum(jnp.zeros_like(x), x),
    "clip": lambda x: jnp.clip(x, 0, 3),
    "lax.max": lambda x: lax.max(x, jnp.zeros((), x.dtype)),
}
BOUNDS = {"relu6": 6.0, "clip": 3.0}


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    ("place", "relu"),
    [(place, "relu") for place in PLACES] + [("plain", relu) for relu in RELUS],
)
def test_every_relu_is_replaced_wherever_it_is(place, relu):
    ghost = lambda x: jnp.minimum(
        recipes.ghost_activation(x, 0.7, "mish"), BOUNDS.get(relu, jnp.inf)
    )
    plain = PLACES[place](RELUS[relu])
    got = recipes.soften(plain, kind="mish")(0.7, X)
    expected = PLACES[place](ghost)(X)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert any(
        np.abs(a - b).max() > 0.01
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(plain(X)), strict=True)
    )


@pytest.mark.parametrize("relu", RELUS)
def test_at_intensity_0_values_and_gradients_are_the_plain_ones(relu):
    x = X.at[0].set(0.0).at[1].set(-0.0)  # where derivatives of ReLUs differ
    plain = lambda x: scan(RELUS[relu])(x)[1]
    ghosted = recipes.soften(plain)
    both = lambda f: jax.jit(lambda x: (f(x), jax.grad(lambda x: f(x).sum())(x)))
    assert bits(both(lambda x: ghosted(jnp.zeros(()), x))(x)) == bits(both(plain)(x))
    assert bits(both(lambda x: ghosted(0.0, x))(x)) == bits(both(plain)(x))


@jax.custom_vjp
def own_derivative(x):
    return jax.nn.relu(x)


own_derivative.defvjp(lambda x: (jax.nn.relu(x), x), lambda x, g: (g * (x > 0),))


@pytest.mark.parametrize(
    "other",
    [
        jax.nn.softplus,
        jax.nn.hard_swish,
        jax.nn.leaky_relu,
        own_derivative,
        lambda x: jnp.maximum(jnp.mean(x**2) - jnp.square(jnp.mean(x)), 0.0),
        lambda x: jnp.maximum(jnp.mean(x**2) - jnp.mean(x) ** 2, 0.0),
        lambda x: jnp.maximum(jnp.mean(x * x) - (m := jnp.mean(x)) * m, 0.0),
        lambda x: jnp.maximum((x * 10).astype(int), 0),
        lambda x: jnp.maximum(x, x - x),
        lambda x: x * jax.random.uniform(jax.random.key(0), x.shape),
        lambda x: jax.image.resize(x, (8, 10), "linear"),
    ],
)
def test_what_is_no_relu_stays(other):
    with pytest.raises(ValueError, match="has none: neither jax.nn.relu nor"):
        recipes.soften(other)(1.0, X)
    ghosted = recipes.soften(lambda x: (other(x), jax.nn.relu(x)))
    assert bits(ghosted(1.0, X)[0]) == bits(other(X))


class Small(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


def test_linen_keeps_its_statistics_and_its_chance():
    model = Small()
    variables = model.init(jax.random.key(0), X, False)
    apply = recipes.soften(model.apply)
    how = {"rngs": {"dropout": jax.random.key(1)}, "mutable": ["batch_stats"]}
    expected = model.apply(variables, X, True, **how)
    output, updated = apply(0.0, variables, X, True, **how)
    assert bits((output, updated)) == bits(expected)
    bent, updated = apply(1.0, variables, X, True, **how)
    assert np.abs(bent - output).max() > 0.1
    assert bits(updated) == bits(expected[1])
    assert isinstance(updated, dict)
    names = recipes.relus(model.apply, variables, X, True, **how)
    assert len(names) == 1 and names[0].startswith("relu (ghost_soften_test.py:")


@pytest.mark.parametrize("relu", ["relu", "relu6", "max (x, 0)", "max of zeros"])
def test_shards_are_softened_as_the_whole(relu):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    network = lambda x: RELUS[relu](x - lax.pmean(x, "data"))
    shards = jax.shard_map(
        lambda x: recipes.soften(network)(0.7, x),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
    )
    one = lambda x: recipes.soften(RELUS[relu])(0.7, x - x.mean(0, keepdims=True))
    np.testing.assert_allclose(jax.jit(shards)(X), one(X), rtol=1e-5, atol=1e-6)


def test_one_program_for_every_intensity_and_a_map_over_them():
    traces = []

    def network(w, x):
        traces.append(x)
        return jnp.tanh(jax.nn.relu(x @ w)).sum()

    step = jax.jit(jax.value_and_grad(recipes.soften(network), argnums=1))
    w = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)), jnp.float32)
    each = [step(intensity, w, X) for intensity in (1.0, 0.5, 0.0)]
    assert len(traces) == 1
    values, gradients = jax.jit(jax.vmap(step, (0, None, None)))(
        jnp.array([1.0, 0.5, 0.0]), w, X
    )
    np.testing.assert_allclose(values, [v for v, _ in each], rtol=1e-6)
    np.testing.assert_allclose(gradients, [g for _, g in each], rtol=1e-5, atol=1e-6)


def test_lists_what_it_replaces_in_order():
    def network(x, *, deep):
        x = jnp.maximum(x, 0)
        x = PLACES["cond"](jax.nn.relu6)(x) if deep else x
        return jax.nn.relu(x)

    found = recipes.relus(network, jax.ShapeDtypeStruct((3,), jnp.float32), deep=True)
    assert [line.split(" ")[0] for line in found] == ["max", "relu6", "relu"]
    assert all("ghost_soften_test.py:" in line for line in found)


def test_refuses_a_kind_when_called_and_an_intensity_when_run():
    with pytest.raises(ValueError, match=r"soften\(kind=...\) must be one of"):
        recipes.soften(jax.nn.relu, kind="gelu")  # pyright: ignore
    with pytest.raises(ValueError, match="soften: the intensity must be 0 or above"):
        recipes.soften(jax.nn.relu)(-1.0, X)
