"""Linear layers of constant fan-in, computed from their weights alone.

A neuron reads k of the inputs: it has k weights and k indices, and the layer two arrays
[neurons, k]. It does fewer multiply-adds than a dense layer, but has to gather what it
multiplies. `benchmarks/condensed.py` measures when that pays.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# How many weights of each neuron are added up between two looks at the sums.
_WEIGHTS_AT_ONCE = 4


class Condensed(NamedTuple):
    """The weights of a layer of constant fan-in; n neurons live and have k weights."""

    weights: jax.Array  # [n, k]
    columns: np.ndarray  # int32 [n, k]: the inputs that they belong to, ascending
    neurons: np.ndarray  # int32 [n]: which neurons live, ascending
    n_out: int  # neurons, dead ones included


def condense(kernel: jax.Array | np.ndarray, mask: np.ndarray | jax.Array) -> Condensed:
    """Collect the active weights of a layer of constant fan-in.

    Args:
      kernel: [in, out].
      mask: bool [in, out], equally many True for every neuron that has any. An active
        weight may be zero, and one that is not active is lost.

    Raises:
      ValueError: shapes differ, or living neurons have different fan-ins.
      TypeError: the mask is not bool.

    References:
      Lasby et al. 2024, "Dynamic sparse training with structured sparsity"
      (arXiv:2305.02299), the condensed representation.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from sparsejax import serving
      >>> mask = np.array([[1, 0, 0], [1, 0, 1], [0, 0, 1]], bool)
      >>> condensed = serving.condense(jnp.arange(9.0).reshape(3, 3), mask)
      >>> condensed.weights.tolist(), condensed.neurons.tolist()
      ([[0.0, 3.0], [5.0, 8.0]], [0, 2])
    """
    mask = np.asarray(mask)
    if mask.dtype != np.bool_:
        raise TypeError(f"condense(mask) must be bool, got {mask.dtype}.")
    if mask.ndim != 2 or mask.shape != kernel.shape:
        raise ValueError(
            "condense(kernel, mask) needs two arrays [in, out], got shapes "
            f"{kernel.shape} and {mask.shape}."
        )
    neurons = np.flatnonzero(mask.any(0))
    fan_in = np.unique(mask.sum(0)[neurons])
    if len(fan_in) != 1:
        raise ValueError(
            "condense(mask) must have equally many active weights for every neuron "
            f"that has any, got {fan_in.tolist() or 'none at all'}; srigl makes such "
            "masks."
        )
    columns = np.nonzero(mask[:, neurons].T)[1].reshape(len(neurons), -1)
    weights = jnp.asarray(kernel)[columns, neurons[:, None]]
    n_out = mask.shape[1]
    return Condensed(weights, columns.astype("i4"), neurons.astype("i4"), n_out)


def condensed_linear(
    x: jax.Array,
    weights: jax.Array,
    columns: jax.Array | np.ndarray,
    neurons: jax.Array | np.ndarray,
    n_out: int,
) -> jax.Array:
    """Multiply vectors by the weights of a layer of constant fan-in.

    It equals the product with the masked kernel, to rounding, and so do its
    derivatives. Dead neurons are zero. Sums are in float32 at least.

    Args:
      x: float [..., in].
      weights: float [n, k].
      columns: int [n, k], the input of each weight; they must be in range.
      neurons: int [n], the output of each row, all different and in range.
      n_out: outputs, dead ones included.

    Returns:
      float [..., n_out].

    Raises:
      ValueError: shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from sparsejax import serving
      >>> mask = np.array([[1, 0, 0], [1, 0, 1], [0, 0, 1]], bool)
      >>> condensed = serving.condense(jnp.arange(9.0).reshape(3, 3), mask)
      >>> serving.condensed_linear(jnp.ones((1, 3)), *condensed).tolist()
      [[3.0, 0.0, 13.0]]
    """
    if (
        weights.ndim != 2
        or weights.shape != columns.shape
        or (neurons.shape != weights.shape[:1])
    ):
        raise ValueError(
            "condensed_linear needs weights and columns [n, k] and neurons [n], got "
            f"{weights.shape}, {columns.shape} and {neurons.shape}."
        )
    vectors = (x if x.ndim == 2 else x.reshape(-1, x.shape[-1])).T
    out = _neurons(vectors, weights, jnp.asarray(columns))
    at = jnp.zeros((n_out, vectors.shape[1]), out.dtype).at[neurons]
    out = at.set(out, mode="promise_in_bounds", unique_indices=True)
    return out.T if x.ndim == 2 else out.T.reshape(*x.shape[:-1], n_out)


def _neurons(vectors: jax.Array, weights: jax.Array, columns: jax.Array) -> jax.Array:
    """Return [n, batch]: a weight of every neuron by what it reads, and the next."""
    dtype = jnp.result_type(vectors, weights)
    exact = jnp.promote_types(dtype, jnp.float32)
    fan_in = weights.shape[1]

    def product(i: int | jax.Array) -> jax.Array:
        weight, column = (
            lax.dynamic_index_in_dim(array, i, axis=1, keepdims=False)
            for array in (weights, columns)
        )
        inputs = vectors.at[column].get(mode="promise_in_bounds")
        return weight[:, None].astype(exact) * inputs

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        first = step * _WEIGHTS_AT_ONCE
        return sum((product(first + i) for i in range(_WEIGHTS_AT_ONCE)), total)

    steps, rest = divmod(fan_in, _WEIGHTS_AT_ONCE)
    start = jnp.zeros((len(weights), vectors.shape[1]), exact)
    total = lax.fori_loop(0, steps, add, start)
    return sum(map(product, range(fan_in - rest, fan_in)), total).astype(dtype)
