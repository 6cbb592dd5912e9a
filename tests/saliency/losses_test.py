"""SNIP, Taylor and GraSP against differences of a loss in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import saliency_oracles
from flax import nnx

from sparsejax import saliency
from sparsejax.saliency._target import target
from sparsejax.saliency.grasp import grasp_scores
from sparsejax.saliency.snip import snip_scores
from sparsejax.saliency.taylor import taylor_scores

N_IN, HIDDEN, CLASSES = 3, 4, 2
SPLIT = N_IN * HIDDEN


def network():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return {
        "a": {"kernel": draw(N_IN, HIDDEN), "bias": draw(HIDDEN)},
        "b": {"kernel": draw(HIDDEN, CLASSES)},
    }


def batches():
    rng = np.random.default_rng(1)
    draw = lambda n: (
        rng.normal(size=(n, N_IN)).astype(np.float32),
        rng.integers(CLASSES, size=n),
    )
    return [draw(5), draw(5), draw(3)]


def loss(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    logits = jax.nn.log_softmax(hidden @ params["b"]["kernel"])
    return -jnp.take_along_axis(logits, y[:, None], axis=1).mean()


def loss_of(flat, batch):
    """Return the same loss in NumPy, of the two kernels as one vector."""
    x, y = batch
    a, b = flat[:SPLIT].reshape(N_IN, HIDDEN), flat[SPLIT:].reshape(HIDDEN, CLASSES)
    logits = np.tanh(x @ a + network()["a"]["bias"]) @ b
    logits = logits - logits.max(axis=1, keepdims=True)
    log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -log_softmax[np.arange(len(y)), y].mean()


def summed_loss(flat):
    return sum(loss_of(flat, batch) for batch in batches())


def flattened(params) -> np.ndarray:
    leaves = [params["a"]["kernel"], params["b"]["kernel"]]
    return np.concatenate([np.ravel(leaf) for leaf in leaves]).astype(np.float64)


def chosen(params):
    return target("test", params, 0.5, "global", "erk", None, None)


def check_scores(scores, expected, rtol=1e-4):
    found = np.concatenate([np.ravel(score) for score in scores])
    np.testing.assert_allclose(found, expected, rtol, atol=1e-6)


def check_mask(masks, expected, sparsity):
    found = flattened(masks).astype(bool)
    kept = oracles.uniform({"all": expected.shape}, sparsity)["all"]
    np.testing.assert_array_equal(found, oracles.top_k(expected, kept))
    assert masks["a"]["bias"] is None


def test_snip_is_the_derivative_by_a_factor_of_each_weight():
    params = network()
    at = flattened(params)
    by_factor = saliency_oracles.gradient(lambda m: summed_loss(m * at), np.ones(20))
    check_scores(snip_scores(loss, params, batches(), chosen(params)), abs(by_factor))
    masks = saliency.snip(loss, params, batches(), sparsity=0.7)
    check_mask(masks, abs(by_factor), 0.7)


def test_snip_under_masks_scores_weights_that_they_prune():
    params = network()
    at = flattened(params)
    before = np.random.default_rng(2).random(20) < 0.5
    before[SPLIT:] = True
    by_factor = saliency_oracles.gradient(lambda m: summed_loss(m * at), 1.0 * before)
    assert (by_factor[~before] != 0).any()
    masks = {
        "a": {"kernel": before[:SPLIT].reshape(N_IN, HIDDEN), "bias": None},
        "b": {"kernel": None},
    }
    found = saliency.snip(loss, params, batches(), sparsity=0.7, masks=masks)
    check_mask(found, abs(by_factor), 0.7)
    assert (flattened(found) > before).any()


def test_taylor_is_snip_where_all_weights_are_active():
    params = network()
    found = taylor_scores(loss, params, batches(), chosen(params))
    check_scores(
        found,
        abs(
            flattened(params)
            * saliency_oracles.gradient(summed_loss, flattened(params))
        ),
    )
    same = snip_scores(loss, params, batches(), chosen(params))
    for one, other in zip(found, same, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_taylor_scores_of_pruned_weights_are_zero():
    params = network()
    params["a"]["kernel"][:, ::2] = 0
    scores, _ = taylor_scores(loss, params, batches(), chosen(params))
    np.testing.assert_array_equal(scores[:, ::2], 0)
    masks = saliency.taylor(loss, params, batches(), sparsity=0.5)
    assert not masks["a"]["kernel"][:, ::2].any()


def test_grasp_is_the_weight_times_hessian_times_gradient():
    params = network()
    at = flattened(params)
    g = saliency_oracles.gradient(summed_loss, at)
    expected = at * (saliency_oracles.hessian(summed_loss, at) @ g)
    assert (expected < 0).any() and (expected > 0).any()
    check_scores(grasp_scores(loss, params, batches(), chosen(params)), expected)
    masks = saliency.grasp(loss, params, batches(), sparsity=0.4)
    check_mask(masks, expected, 0.4)


def test_grasp_ignores_the_scale_of_the_loss_and_not_that_of_the_logits():
    params = network()

    def at_temperature(params, batch):
        head = {"kernel": params["b"]["kernel"] / 200}
        return loss({**params, "b": head}, batch)

    mask = lambda f: flattened(saliency.grasp(f, params, batches(), sparsity=0.4))
    plain = mask(loss)
    np.testing.assert_array_equal(plain, mask(lambda *args: 8 * loss(*args)))
    assert (plain != mask(at_temperature)).any()


def test_grasp_goes_through_the_batches_twice():
    with pytest.raises(TypeError, match="give a list of them, got list_iterator"):
        saliency.grasp(loss, network(), iter(batches()), sparsity=0.5)


def test_grasp_meets_the_identity_of_euler_before_a_norm_over_the_batch():
    """Where a scale of w changes nothing, sum(w * Hg) is -sum(g * g)."""

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 3, (3, 3), use_bias=False, rngs=rngs)
            self.norm = nnx.BatchNorm(3, epsilon=1e-12, rngs=rngs)
            self.head = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.norm(self.conv(x))).mean(axis=(1, 2)))

    model = Network(nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, batch):
        x, y = batch
        logits = nnx.merge(graphdef, params, rest, copy=True)(x)
        return jnp.mean((logits - y) ** 2)

    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    data = [(draw(4, 5, 5, 2), draw(4, 2))]
    conv, head = grasp_scores(loss, params, data, chosen(params))
    g = nnx.as_pure(jax.jit(jax.grad(loss))(params, data[0]))
    of_conv, of_head = (float((g[k]["kernel"] ** 2).sum()) for k in ("conv", "head"))
    np.testing.assert_allclose(float(conv.sum()), -of_conv, rtol=1e-3)
    assert abs(float(head.sum()) + of_head) > 0.1 * of_head
