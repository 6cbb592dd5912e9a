"""The neurons and layers of a network, for counts over each."""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout as Order
from jax.experimental.layout import with_layout_constraint

from sparsejax.masks._search import Slices, count_reached, search, zero_of
from sparsejax.masks.layout import Layout


class Network:
    """The neurons ("rows") and layers of several weights, each numbered through.

    Vectors are [rows] or [layers], and the same on all devices.
    """

    def __init__(self, weights: Sequence[jax.Array], layouts: Sequence[Layout]):
        fan_in, layers, moved = [], [], []
        for weight, layout in zip(weights, layouts, strict=True):
            axes = layout.layer_axes(weight.ndim)
            layers.append(tuple(range(weight.ndim)) if axes is None else axes)
            own = layout.fan_in_axes(weight.ndim)
            others = [i for i in range(weight.ndim) if i not in own]
            fan_in.append(own)
            moved.append([weight.shape[i] for i in (*others, *own)])
        self.rows = Slices(weights, fan_in, shared=False)
        self.layers = Slices(weights, layers, shared=False)
        self.fan_in_sizes = [
            weight.size // n for weight, n in zip(weights, self.rows.sizes, strict=True)
        ]
        self.on_mesh = not all(jax.typeof(w).sharding.mesh.empty for w in weights)
        self.last_axes = [
            tuple(range(len(shape) - len(own), len(shape))) if self.on_mesh else (1,)
            for own, shape in zip(fan_in, moved, strict=True)
        ]
        self._moved_shapes = moved
        self.zero = zero_of(weights)

    def fan_in_last(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """Return an array for each weight with the fan-in axes behind all others.

        XLA's CPU backend counts along the last axes several times faster, and again
        along a single one: they are merged, except on a mesh, where they may be
        sharded.
        """
        found = []
        for x, own, n in zip(arrays, self.rows.axes, self.rows.sizes, strict=True):
            x = jnp.moveaxis(x, own, range(x.ndim - len(own), x.ndim))
            found.append(x if self.on_mesh else x.reshape(n, -1))
        return found

    def in_place(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """Undo `fan_in_last`.

        In memory, too: XLA would rather keep masks transposed, and to have them so in
        both branches of a conditional, it would transpose them at every step. On a
        mesh, where it gathers what has an order in memory, it does.
        """
        found = []
        for x, own, shape in zip(
            arrays, self.rows.axes, self._moved_shapes, strict=True
        ):
            last = range(len(shape) - len(own), len(shape))
            x = jnp.moveaxis(x.reshape(shape), last, own)
            in_order = Order(tuple(range(x.ndim)))
            found.append(x if self.on_mesh else with_layout_constraint(x, in_order))
        return found

    def per_layer(self, numbers: Sequence[chex.Numeric]) -> jax.Array:
        """Return [layers] from one number for each weight, or one a stacked layer."""
        parts = [
            jnp.broadcast_to(jnp.asarray(n, jnp.int32).reshape(-1), size)
            for n, size in zip(numbers, self.layers.sizes, strict=True)
        ]
        return self.layers.join(parts)

    def to_rows(self, vector: jax.Array) -> jax.Array:
        """Return [rows] with what [layers] holds for the layer of each row."""
        parts = zip(self.layers.split(vector), self.rows.shapes, strict=True)
        return self.rows.join([jnp.broadcast_to(part, shape) for part, shape in parts])

    def layer_counts(self, masks: Sequence[jax.Array]) -> jax.Array:
        """Return how many positions are True, [layers]."""
        return self.layers.join(list(map(_count, masks, self.layers.axes)))

    def row_counts(self, masks: Sequence[jax.Array]) -> jax.Array:
        """Return how many positions are True, [rows]."""
        moved = self.fan_in_last(masks)
        return self.rows.join(list(map(_count, moved, self.last_axes)))

    def rows_per_layer(self, chosen: jax.Array) -> jax.Array:
        """Return how many rows are True, [layers]."""
        return self.layer_counts(self.rows.split(chosen))

    def clamp(self, salient: jax.Array, budget: jax.Array) -> jax.Array:
        """Return the highest threshold at which enough rows live to hold the budget.

        That is, [layers], how many salient weights the row has that is ranked
        ``budget // size of a row``, counted from 0, by this number.
        """
        size = self.layers.constant(self.fan_in_sizes)
        keys = [part.astype(jnp.uint32) for part in self.rows.split(salient)]
        rank = budget // size.astype(jnp.int32) + 1 + self.zero
        found = search(self.layers.counter(keys), rank, size + 1, exact=True)
        return found.threshold.astype(jnp.int32)


def _count(mask: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Count over ``axes``; what two thresholds are for, `count_reached` says."""
    return count_reached(mask, [jnp.bool_(True), jnp.bool_(False)], axes)[0]
