"""Masks applied to parameters."""

from typing import Any

import jax

from sparsejax._trees import check_same_leaves
from sparsejax.masks.blend import masked
from sparsejax.masks.layout import named_leaves


def prune(params: Any, masks: Any) -> Any:
    """Set the weights off the masks to exactly 0.

    Args:
      params: tree of arrays, as in `magnitude`.
      masks: tree like ``params`` of bool arrays, ``True`` where a weight is active,
        and None where a leaf is dense.

    Returns:
      Tree like ``params``.

    Raises:
      ValueError: the masks belong to other parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import saliency
      >>> params = {"kernel": jnp.array([[1.0, -5.0], [3.0, 0.5]]), "bias": jnp.ones(2)}
      >>> masks = saliency.magnitude(params, sparsity=0.5)
      >>> saliency.prune(params, masks)["kernel"].tolist()
      [[0.0, -5.0], [3.0, 0.0]]
    """
    check_same_leaves("prune(masks)", params, masks)
    named = named_leaves(masks)
    leaves = [
        masked(named[path], param) if path in named else param
        for path, param in named_leaves(params).items()
    ]
    return jax.tree.structure(params).unflatten(leaves)
