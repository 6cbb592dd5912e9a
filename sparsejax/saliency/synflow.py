"""SynFlow: prune without data, and without emptying a layer."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from sparsejax.distributions import Distribution
from sparsejax.masks.blend import masked
from sparsejax.masks.layout import Layout, Where
from sparsejax.saliency._flow import flow, unsigned
from sparsejax.saliency._target import Scope, Target, target


def synflow(
    apply: Callable[[Any, jax.Array], Any],
    params: Any,
    input_shape: Sequence[int],
    *,
    sparsity: float,
    rounds: int = 100,
    scope: Scope = "global",
    distribution: str | Distribution = "erk",
    where: Where = None,
    layout: Mapping[str, Layout] | None = None,
) -> Any:
    """Keep the weights that the strongest paths from input to output run through.

    With all weights at their absolute values and an input of ones, R is the sum of the
    outputs; the score of a weight is ``|w| * dR/d|w|``, the sum over all paths through
    it. Pruning goes in rounds, in each of which the density falls by the same factor.

    Norms are left out: biases, shifts and means are dropped, and scales and variances
    are 1, as is every vector and every scalar parameter. Arrays are rescaled where all
    paths meet, so that deep networks stay in the range of float32; scores keep their
    order.

    Args:
      apply: ``(params, x) -> outputs``, any tree. Norms must use fixed statistics, as
        they do in evaluation, whatever these are; the rest must be ReLUs, linear, or
        otherwise positively homogeneous.
      params: as in `magnitude`; only magnitudes count.
      input_shape: of the float32 input, the batch included, which may be 1.
      sparsity: as in `magnitude`.
      rounds: of scoring and pruning. Few of them empty layers.
      scope: as in `magnitude`.
      distribution: as in `magnitude`.
      where: as in `magnitude`.
      layout: as in `magnitude`.

    Returns:
      Masks, as `magnitude` returns them.

    Raises:
      ValueError: as `magnitude`; ``rounds`` below 1; outside `jax.jit`, a network
        where the flow from the input is not conserved, is 0 or no finite number.
      TypeError: as `magnitude`.

    References:
      Tanaka et al. 2020, "Pruning neural networks without any data by iteratively
      conserving synaptic flow", section 6, algorithm 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import saliency
      >>> def apply(params, x):
      ...     return jax.nn.relu(x @ params["a"]) @ params["b"]
      >>> params = {"a": jnp.array([[1.0, -5.0]]), "b": jnp.array([[4.0], [0.5]])}
      >>> masks = saliency.synflow(apply, params, (1, 1), sparsity=0.5)
      >>> masks["a"].tolist(), masks["b"].tolist()
      ([[True, False]], [[True], [False]])
    """
    chosen = target("synflow", params, sparsity, scope, distribution, where, layout)
    if not isinstance(rounds, int) or rounds < 1:
        raise ValueError(
            f"synflow(rounds=...) must be an integer of at least 1, got {rounds!r}."
        )

    @jax.jit
    def prune(params):
        def prune_once(masks, turn):
            scores, *flows = synflow_scores(apply, params, masks, input_shape, chosen)
            kept = _kept(chosen, turn / rounds)
            return chosen.select(scores, kept, where=masks), flows

        start = [jnp.ones_like(w, dtype=bool) for w in chosen.weights(params)]
        masks, flows = lax.scan(prune_once, start, jnp.arange(1, rounds + 1))
        return masks, *(flow[0] for flow in flows)

    masks, total, entering = prune(params)
    if not isinstance(total, Tracer):
        _check_conserved(float(total), float(entering))
    return chosen.tree(params, masks)


def synflow_scores(
    apply: Callable[[Any, jax.Array], Any],
    params: Any,
    masks: Sequence[jax.Array],
    input_shape: Sequence[int],
    chosen: Target,
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Return scores, R, and the score of the input, all up to one power of two.

    The score of the input, the sum of ``x * dR/dx``, is R where flow is conserved.
    """
    x = jnp.ones(input_shape)
    dense = jax.tree.map(unsigned, params)
    active = [
        masked(mask, jnp.abs(w.astype(jnp.float32)))
        for mask, w in zip(masks, chosen.weights(params), strict=True)
    ]
    total = lambda active, x: flow(apply, chosen.replace(dense, active), x)
    value, (by_weight, by_x) = jax.value_and_grad(total, argnums=(0, 1))(active, x)
    scores = [w * g for w, g in zip(active, by_weight, strict=True)]
    return scores, value, jnp.sum(x * by_x)


def _kept(chosen: Target, done: jax.Array) -> list[jax.Array]:
    """Return how many weights stay when so much of the rounds is done, from 0 to 1."""
    numbers = []
    for size, kept in zip(chosen.sizes, chosen.kept, strict=True):
        kept = jnp.asarray(kept, jnp.int32)
        between = jnp.ceil(size * (kept / size) ** done).astype(jnp.int32)
        numbers.append(jnp.where(done == 1, kept, jnp.maximum(between, kept)))
    return numbers


def _check_conserved(total: float, entering: float) -> None:
    if not (math.isfinite(total) and total > 0):
        raise ValueError(
            "synflow(apply): the sum of the outputs, with weights at their absolute "
            f"values and an input of ones, must be positive and finite, got {total}. "
            "It is 0 where a layer is all zeros, as some last layers are at first; it "
            "overflows where many layers lie between two points that all paths meet in."
        )
    if abs(entering - total) > 0.05 * total:  # bfloat16 rounds that much
        raise ValueError(
            "synflow(apply): what enters the network must leave it, so that the sum of "
            f"x * dR/dx is R; got {entering:.6g} and R = {total:.6g} (up to a factor). "
            "Use fixed statistics in norms, as evaluation does, ReLU for other "
            "activations, and leave out layer norms and attention."
        )
