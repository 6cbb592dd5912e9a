"""The layer of Flax NNX of constant fan-in."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes

from sparsejax.serving.condensed import condense, condensed_linear


class Index(nnx.Variable):
    """Positions of weights: part of a model's state, and not trained."""


class CondensedLinear(nnx.Module):
    """A linear layer of constant fan-in; see `condensed_linear`.

    Its parameters are ``weights`` [n, k] and ``bias``.

    Args:
      kernel: [in, out].
      mask: bool [in, out], equally many True for every neuron that has any.
      bias: [out], or None. Dead neurons have theirs, as in the masked layer.
      dtype: of the computation; None: that of input and parameters.
      promote_dtype: as in ``nnx.Linear``.

    Raises:
      ValueError, TypeError: as `condense`.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from sparsejax import serving
      >>> mask = np.array([[1, 0, 0], [1, 0, 1], [0, 0, 1]], bool)
      >>> layer = serving.CondensedLinear(jnp.ones((3, 3)), mask, jnp.ones(3))
      >>> layer(jnp.ones((1, 3))).tolist()
      [[3.0, 1.0, 3.0]]
    """

    def __init__(
        self,
        kernel: jax.Array,
        mask: np.ndarray | jax.Array,
        bias: jax.Array | None = None,
        *,
        dtype: Any = None,
        promote_dtype: Any = dtypes.promote_dtype,
    ):
        weights, columns, neurons, self.n_out = condense(kernel, mask)
        self.weights = nnx.Param(weights)
        self.columns = Index(jnp.asarray(columns))
        self.neurons = Index(jnp.asarray(neurons))
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))
        self.dtype = dtype
        self.promote_dtype = promote_dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [..., out] for x [..., in]."""
        bias = None if self.bias is None else self.bias[...]
        x, weights, bias = self.promote_dtype(
            (x, self.weights[...], bias), dtype=self.dtype
        )
        index = self.columns[...], self.neurons[...]
        y = condensed_linear(x, weights, *index, self.n_out)
        return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
