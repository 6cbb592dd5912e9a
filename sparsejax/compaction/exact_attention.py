"""Attention whose heads lost dimensions and that keeps the scale of the full ones."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class AtFullDepth:
    """An attention function that computes as at the full size of a head.

    Attention divides by the square root of the size of its heads. ``nnx``'s own is
    given the scale of the full size. Any other function is given queries, keys and
    values filled up with zeros, which is exact whatever it does with the size, and
    costs what it cost before.

    Attributes:
      attention_fn: what it computes, as ``nnx.MultiHeadAttention`` takes it.
      full_depth: the size of a head in the full model.
    """

    attention_fn: Callable[..., jax.Array]
    full_depth: int

    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options
    ) -> jax.Array:
        """Attend.

        Args:
          query: [..., length, heads, depth].
          key: [..., length, heads, depth].
          value: [..., length, heads, depth].
          **options: those of ``attention_fn``.

        Returns:
          [..., length, heads, depth].
        """
        if 0 in (query.shape[-2], value.shape[-1]):  # no head is left, or none of any
            return jnp.zeros((*query.shape[:-1], value.shape[-1]), value.dtype)
        fused = not options.get("dropout_rate") and options.get("module") is None
        if self.attention_fn is nnx.dot_product_attention and fused and query.ndim <= 4:
            return _fused(query, key, value, self.full_depth, **options)
        depth = value.shape[-1]
        to_full = lambda x: jnp.pad(
            x, [(0, 0)] * (x.ndim - 1) + [(0, self.full_depth - x.shape[-1])]
        )
        arrays = (to_full(x) for x in (query, key, value))
        return self.attention_fn(*arrays, **options)[..., :depth]

    @property
    def __signature__(self) -> inspect.Signature:
        """That of ``attention_fn``: Linen passes only options that it finds there."""
        return inspect.signature(self.attention_fn)


def _fused(
    query,
    key,
    value,
    full_depth,
    *,
    dtype=None,
    bias=None,
    mask=None,
    is_causal=False,
    **_,
):
    """Compute ``nnx.dot_product_attention`` without dropout, with the full scale."""
    dtype = dtype or jnp.result_type(query, key, value)
    return jax.nn.dot_product_attention(
        query.astype(dtype),
        key.astype(dtype),
        value.astype(dtype),
        bias,
        None if mask is None else mask.astype(bool),
        scale=1.0 / math.sqrt(full_depth),
        is_causal=is_causal,
    )


def at_full_depth(attention_fn: Callable[..., Any], full_depth: int) -> AtFullDepth:
    """Return an attention function that keeps the scale of heads of ``full_depth``."""
    if isinstance(attention_fn, AtFullDepth):
        return attention_fn  # compacted before: the first full size holds
    return AtFullDepth(attention_fn, full_depth)
