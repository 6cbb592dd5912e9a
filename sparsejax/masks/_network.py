"""The neurons and layers of a network, for counts over each."""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.masks._search import Slices, count_true, search, zero_of
from sparsejax.masks.layout import Layout


class Network:
    """The neurons ("rows") and layers of several weights, each numbered through.

    Vectors are [rows] or [layers], and the same on all devices.
    """

    def __init__(self, weights: Sequence[jax.Array], layouts: Sequence[Layout]):
        fan_in, layers = [], []
        for weight, layout in zip(weights, layouts, strict=True):
            axes = layout.layer_axes(weight.ndim)
            layers.append(tuple(range(weight.ndim)) if axes is None else axes)
            fan_in.append(layout.fan_in_axes(weight.ndim))
        self.rows = Slices(weights, fan_in, shared=False)
        self.layers = Slices(weights, layers, shared=False)
        self.fan_in_sizes = [
            weight.size // n for weight, n in zip(weights, self.rows.sizes, strict=True)
        ]
        numbers = np.split(np.arange(self.layers.count), np.cumsum(self.layers.sizes))
        self._layer_of_row = np.concatenate(
            [
                np.broadcast_to(own.reshape(one), many).ravel()
                for own, one, many in zip(
                    numbers[:-1], self.layers.shapes, self.rows.shapes, strict=True
                )
            ]
        )
        self.zero = zero_of(weights)

    def per_layer(self, numbers: Sequence[chex.Numeric]) -> jax.Array:
        """Return [layers] from one number for each weight, or one a stacked layer."""
        parts = [
            jnp.broadcast_to(jnp.asarray(n, jnp.int32).reshape(-1), size)
            for n, size in zip(numbers, self.layers.sizes, strict=True)
        ]
        return self.layers.join(parts)

    def to_rows(self, vector: jax.Array) -> jax.Array:
        """Return [rows] with what [layers] holds for the layer of each row."""
        return vector[self._layer_of_row]

    def row_counts(self, *masks: Sequence[jax.Array]) -> list[jax.Array]:
        """Return how many positions are True, [rows], in each of several lists."""
        pairs = zip(zip(*masks, strict=True), self.rows.axes, strict=True)
        counts = [count_true(arrays, axes) for arrays, axes in pairs]
        return [self.rows.join(parts) for parts in zip(*counts, strict=True)]

    def add_rows(self, vector: jax.Array) -> jax.Array:
        """Add up [rows] by layer, int32 [layers]."""
        return jax.ops.segment_sum(
            vector.astype(jnp.int32),
            self._layer_of_row,
            self.layers.count,
            indices_are_sorted=all(size == 1 for size in self.layers.sizes),
        )

    def clamp(self, salient: jax.Array, budget: jax.Array) -> jax.Array:
        """Return the highest threshold at which enough rows live to hold the budget.

        That is, [layers], how many salient weights the row has that is ranked
        ``budget // size of a row``, counted from 0, by this number.
        """
        size = self.layers.constant(self.fan_in_sizes)
        keys = salient.astype(jnp.uint32)
        count = lambda tries: [self.add_rows(keys >= self.to_rows(t)) for t in tries]
        rank = budget // size.astype(jnp.int32) + 1 + self.zero
        found = search(count, rank, size + 1, exact=True)
        return found.threshold.astype(jnp.int32)
