"""Ghost neurons: smooth activations that anneal into exactly ReLU."""

import math
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jax import lax

Kind = Literal["swish", "mish"]

SHARPEST = 1e-3

_SOFT = {
    "swish": lambda x, t: x * jax.nn.sigmoid(t),
    "mish": lambda x, t: x * jnp.tanh(jax.nn.softplus(t)),
}


def ghost_activation(
    x: jax.Array, intensity: chex.Numeric, kind: Kind = "swish"
) -> jax.Array:
    """Return a smooth activation that is ReLU at intensity 0.

    With the intensity l, it is ``x * sigmoid(x / l)`` (Swish) or
    ``x * tanh(softplus(x / l))`` (Mish). Its distance to ReLU is at most 0.27847 l or
    0.30885 l, so that it fades without a jump.

    At intensity 0 it is ReLU bit for bit, and so are its derivatives; with the Python
    number 0 nothing else is compiled. A positive intensity below 0.001 counts as 0.001.
    Values and derivatives are NaN only where x is.

    The paper has the two activations early in training. How they fade is this
    project's: the authors' code keeps them to the end.

    Args:
      x: floating-point array. float16 and bfloat16 are computed in float32.
      intensity: number or scalar array, traced or not; a traced one that is negative
        counts as 0.
      kind: "swish" or "mish".

    Returns:
      Array of the shape and dtype of x.

    Raises:
      ValueError: the kind is neither, or the intensity is a negative number or no
        scalar.
      TypeError: x is no floating-point array.

    References:
      Jaiswal et al. 2022, "Training your sparse neural network better with any mask",
      section 3.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import recipes
      >>> x = jnp.array([-2.0, -0.1, 1.0])
      >>> [round(float(y), 4) for y in recipes.ghost_activation(x, 0.5)]
      [-0.036, -0.045, 0.8808]
      >>> recipes.ghost_activation(x, 0.0).tolist()
      [0.0, 0.0, 1.0]
    """
    check_kind("ghost_activation(kind=...)", kind)
    check_intensity("ghost_activation(intensity=...)", intensity)
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"ghost_activation(x): x must be a floating-point array, got {x.dtype}."
        )
    if isinstance(intensity, int | float) and intensity == 0:
        return jax.nn.relu(x)
    return unless_faded(intensity, soft(x, intensity, kind), jax.nn.relu(x))


def soft(x: jax.Array, intensity: chex.Numeric, kind: Kind) -> jax.Array:
    """Return the activation at a positive intensity; arguments as above.

    Beyond 100 times the intensity it is ReLU to the last bit. There the smooth form
    sees 0 in place of x, so that no quotient overflows.
    """
    exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    width = jnp.maximum(jnp.asarray(intensity, exact.dtype), SHARPEST)
    is_near = jnp.abs(exact) < 100 * width
    near = jnp.where(is_near, exact, 0.0)
    bent = _SOFT[kind](near, near / width).astype(x.dtype)
    return jnp.where(is_near, bent, jax.nn.relu(x))


def unless_faded(intensity: chex.Numeric, ghost: jax.Array, plain: jax.Array):
    """Return what has the ghost while the intensity is positive, then ``plain``.

    It is a select, so that after the fade neither a rounding nor a NaN of the ghost
    is left in values, nor anything of it in derivatives.
    """
    return lax.select(jnp.asarray(intensity) > 0, ghost, plain)


def check_kind(argument: str, kind: str) -> None:
    """Raise ValueError, naming the argument, unless there is such a kind."""
    if kind not in _SOFT:
        raise ValueError(f"{argument} must be one of {list(_SOFT)}, got {kind!r}.")


def check_intensity(argument: str, intensity: chex.Numeric) -> None:
    """Raise ValueError, naming the argument, unless it is a scalar, 0 or above."""
    if jnp.shape(intensity):
        raise ValueError(
            f"{argument} must be one number, got shape {jnp.shape(intensity)}; map "
            "over several with jax.vmap."
        )
    if isinstance(intensity, int | float) and not 0 <= intensity < math.inf:
        raise ValueError(f"{argument} must be 0 or above and finite, got {intensity}.")
