"""Magnitude pruning in one shot."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from sparsejax.distributions import Distribution
from sparsejax.masks.layout import Layout, Where
from sparsejax.saliency._target import Scope, target


def magnitude(
    params: Any,
    *,
    sparsity: float,
    scope: Scope = "global",
    distribution: str | Distribution = "erk",
    where: Where = None,
    layout: Mapping[str, Layout] | None = None,
) -> Any:
    """Keep the weights of largest magnitude.

    Meant for trained weights; before training it only measures the initialisation. To
    prune step by step while training, see `sparsejax.sparse_optax.magnitude`.

    Args:
      params: tree of arrays, such as Linen's params or the state of an NNX module, or
        the module itself. Leaves that are to be sparse are float32, bfloat16 or
        float16; scores are ranked in float32, ties by the order of leaves and then to
        the lowest index.
      sparsity: fraction of weights that are zero, in [0, 1).
      scope: "global" ranks the weights of all sparse leaves together; "layer" ranks
        those of each layer, which keeps what ``distribution`` says.
      distribution: "erk", "uniform", or a function ``(shapes, sparsity) -> kept`` as
        in `sparsejax.distributions`; not read with "global" scope.
      where: which leaves are sparse; see `sparsejax.masks.select_leaves`. With
        "global" scope a dict may only say 0.
      layout: dict from path regex to `sparsejax.masks.Layout`.

    Returns:
      Tree like ``params`` of bool arrays, ``True`` where a weight is active, exactly
      as many as was asked for, and None where a leaf is dense.

    Raises:
      ValueError: arguments that cannot be meant, or that do not fit the tree; a NaN
        score, outside `jax.jit`, where it is never chosen.
      TypeError: likewise, or a leaf of another dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import saliency
      >>> params = {"a": jnp.array([[1.0, -5.0]]), "b": jnp.array([[3.0], [0.5]])}
      >>> masks = saliency.magnitude(params, sparsity=0.5)
      >>> masks["a"].tolist(), masks["b"].tolist()
      ([[False, True]], [[True], [False]])
    """
    chosen = target("magnitude", params, sparsity, scope, distribution, where, layout)
    return chosen.masks(params, [jnp.abs(w) for w in chosen.weights(params)])
