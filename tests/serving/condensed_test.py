"""Linear layers of constant fan-in against the masked dense layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax import serving


def constant_fan_in(rng, n_in=12, n_out=9, k=4, dead=(2, 7)):
    mask = np.zeros((n_in, n_out), bool)
    for neuron in set(range(n_out)) - set(dead):
        mask[rng.permutation(n_in)[:k], neuron] = True
    kernel = rng.normal(size=mask.shape) * mask
    kernel[np.flatnonzero(mask[:, 0])[0], 0] = 0  # active, and zero
    return kernel, mask


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dead", [(2, 7), ()])
def test_layer_equals_the_masked_linear_layer(dtype, dead):
    rng = np.random.default_rng(0)
    kernel, mask = constant_fan_in(rng, dead=dead)
    bias = rng.normal(size=9)
    dense = nnx.Linear(12, 9, param_dtype=dtype, rngs=nnx.Rngs(0))
    dense.kernel.set_value(jnp.asarray(kernel, dtype))
    dense.bias.set_value(jnp.asarray(bias, dtype))
    condensed = serving.CondensedLinear(dense.kernel[...], mask, dense.bias[...])
    assert condensed.weights.shape == (9 - len(dead), 4)
    x = jnp.asarray(rng.normal(size=(2, 3, 12)), dtype)
    y = condensed(x)
    assert y.dtype == dtype
    exact = np.asarray(x, "f8") @ np.asarray(dense.kernel[...], "f8")
    exact += np.asarray(dense.bias[...], "f8")
    atol = 1e-5 if dtype == "float32" else 5e-2
    np.testing.assert_allclose(np.asarray(y, "f8"), exact, atol=atol)
    one = np.asarray(condensed(x[0, 0]), "f8")
    np.testing.assert_allclose(one, exact[0, 0], atol=atol)


def test_neurons_may_come_in_any_order():
    kernel, mask = constant_fan_in(np.random.default_rng(5), dead=())
    weights, columns, neurons, n_out = serving.condense(kernel, mask)
    x, order = jnp.eye(12), np.array([3, 0, 8, 1, 5, 7, 2, 6, 4])
    y = serving.condensed_linear(x, weights[order], columns[order], order, n_out)
    np.testing.assert_allclose(y, kernel, rtol=1e-6)


def test_sums_of_half_precision_are_exact():
    x = jnp.ones((8, 4096), jnp.bfloat16)  # in bfloat16, 256 + 1 is 256
    weights, columns = jnp.ones((2, 1001), x.dtype), np.tile(np.arange(1001), (2, 1))
    y = serving.condensed_linear(x, weights, columns, np.arange(2), 2)
    np.testing.assert_array_equal(y, jnp.full((8, 2), 1001, x.dtype))


@pytest.mark.parametrize("batch", [1, 6])
def test_neurons_see_no_input_but_their_own(batch):
    kernel, mask = constant_fan_in(np.random.default_rng(4), k=3)
    x = jnp.ones((batch, 12)).at[:, 0].set(jnp.nan)
    y = serving.condensed_linear(x, *serving.condense(kernel, mask))
    reads = np.broadcast_to(mask[0], y.shape)
    np.testing.assert_array_equal(np.isnan(y), reads)


@pytest.mark.parametrize("batch", [1, 5, 40])
@pytest.mark.parametrize("fan_in", [1, 4, 7])
def test_gradients_equal_those_of_the_masked_kernel(batch, fan_in):
    rng = np.random.default_rng(1)
    kernel, mask = constant_fan_in(rng, n_out=37, k=fan_in)
    x = jnp.asarray(rng.normal(size=(batch, 12)), jnp.float32)
    weights, columns, neurons, n_out = serving.condense(kernel, mask)

    def loss(x, weights):
        y = serving.condensed_linear(x, weights, columns, neurons, n_out)
        return (y**3).sum()

    x_grad, grad = jax.jit(jax.grad(loss, (0, 1)))(x, weights)
    kernel = jnp.asarray(kernel, jnp.float32)
    dense = jax.jit(jax.grad(lambda x, kernel: ((x @ kernel) ** 3).sum(), (0, 1)))
    expected_x, expected = dense(x, kernel)
    np.testing.assert_allclose(x_grad, expected_x, rtol=1e-4, atol=1e-4)
    own = np.asarray(expected)[columns, neurons[:, None]]
    np.testing.assert_allclose(grad, own, rtol=1e-4, atol=1e-4)


def test_it_is_exported_and_trained(tmp_path):
    kernel, mask = constant_fan_in(np.random.default_rng(2))
    layer = serving.CondensedLinear(jnp.asarray(kernel, jnp.float32), mask)
    grads = nnx.grad(lambda layer, x: layer(x).sum())(layer, jnp.ones((2, 12)))
    assert [path for path, _ in nnx.to_flat_state(grads)] == [("weights",)]
    path = tmp_path / "layer.safetensors"
    serving.export(layer, path, jnp.ones((1, 12)))
    served = serving.load(path)
    x = jnp.arange(36.0).reshape(3, 12)
    np.testing.assert_allclose(served(x), np.asarray(x) @ kernel, rtol=1e-5)


def test_wrong_masks():
    kernel, mask = constant_fan_in(np.random.default_rng(3))
    uneven = mask.copy()
    uneven[np.flatnonzero(mask[:, 0])[0], 0] = False
    with pytest.raises(ValueError, match=r"equally many active .* got \[3, 4\]"):
        serving.condense(kernel, uneven)
    with pytest.raises(ValueError, match="got none at all"):
        serving.condense(kernel, np.zeros_like(mask))
    with pytest.raises(ValueError, match=r"\(12, 9\) and \(9, 12\)"):
        serving.condense(kernel, mask.T)
    with pytest.raises(TypeError, match="must be bool, got float64"):
        serving.condense(kernel, mask.astype(float))
    condensed = serving.condense(kernel, mask)
    with pytest.raises(ValueError, match=r"got \(7, 4\), \(7, 3\) and \(7,\)"):
        wrong = condensed._replace(columns=condensed.columns[:, 1:])
        serving.condensed_linear(jnp.ones((1, 12)), *wrong)
