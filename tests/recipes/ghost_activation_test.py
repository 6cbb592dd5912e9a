"""Ghost activations against NumPy in float64, and where they must be ReLU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import recipes

KINDS = ("swish", "mish")
EXTREMES = [-np.inf, -3e38, -1e3, -0.0, 0.0, 1e-3, 1e3, 3e38, np.inf]


def oracle(x, intensity, kind):
    t = x / intensity
    if kind == "swish":
        return x / (1 + np.exp(-t))
    return x * np.tanh(np.logaddexp(t, 0))


def bits(x):
    return np.asarray(x).tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("intensity", [1.0, 0.3, 1e-2, 1e-3])
def test_is_the_formula_of_the_paper(kind, intensity):
    x = np.linspace(-20, 20, 4001) * intensity
    expected = oracle(x, intensity, kind)
    got = recipes.ghost_activation(jnp.asarray(x, jnp.float32), intensity, kind)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6 * intensity)


@pytest.mark.parametrize(("kind", "gap"), [("swish", 0.27846), ("mish", 0.30884)])
@pytest.mark.parametrize("intensity", [1.0, 0.1, 2e-3])
def test_largest_distance_to_relu_is_that_of_the_paper(kind, gap, intensity):
    x = jnp.linspace(-5, 5, 20001) * intensity
    distance = jnp.abs(recipes.ghost_activation(x, intensity, kind) - jax.nn.relu(x))
    np.testing.assert_allclose(distance.max() / intensity, gap, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("traced", [False, True])
def test_is_relu_bit_for_bit_at_intensity_0(kind, dtype, traced):
    drawn = np.random.default_rng(0).normal(size=100)
    x = jnp.asarray(np.append(drawn, [*EXTREMES, np.nan]), jnp.float32).astype(dtype)

    def ghost(x):
        return recipes.ghost_activation(x, jnp.zeros(()) if traced else 0.0, kind)

    for f in (lambda f: f, lambda f: jax.vmap(jax.grad(f))):
        got, expected = f(ghost)(x), f(jax.nn.relu)(x)
        assert got.dtype == dtype
        assert bits(got) == bits(expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_neither_values_nor_gradients_are_nan(kind, dtype):
    ghost = lambda x, intensity: recipes.ghost_activation(x, intensity, kind)

    @jax.jit
    @jax.vmap
    def values(intensity):
        gradients = jax.vmap(jax.value_and_grad(ghost, argnums=(0, 1)), (0, None))
        return gradients(jnp.array(EXTREMES).astype(dtype), intensity)

    y, (by_x, by_intensity) = values(jnp.array([0.0, 1e-30, 1e-3, 0.5, 1.0, 1e3]))
    assert not np.isnan(y.astype(np.float32)).any()
    assert np.isfinite(by_x.astype(np.float32)).all()
    assert np.isfinite(by_intensity).all()
    assert (np.asarray(by_intensity[0]) == 0).all()


def test_literal_0_compiles_to_relu_alone():
    program = jax.make_jaxpr(lambda x: recipes.ghost_activation(x, 0))(jnp.ones(3))
    assert str(program) == str(jax.make_jaxpr(jax.nn.relu)(jnp.ones(3)))


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (ValueError, "swish.*got 'gelu'", (jnp.ones(2), 1.0, "gelu")),
        (ValueError, "0 or above and finite, got -0.5", (jnp.ones(2), -0.5)),
        (ValueError, "finite, got nan", (jnp.ones(2), float("nan"))),
        (ValueError, r"one number, got shape \(2,\)", (jnp.ones(2), jnp.ones(2))),
        (TypeError, "floating-point array, got int32", (jnp.ones(2, int), 1.0)),
    ],
)
def test_refuses_what_cannot_be_meant(error, words, arguments):
    with pytest.raises(error, match=words):
        recipes.ghost_activation(*arguments)
