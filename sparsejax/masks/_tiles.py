"""A weight cut into tiles of neighbouring inputs and neurons.

Tiles are cut along the last of the input axes and the last of the output axes of a
layout: spatial positions and stacked layers stay apart, and no axes are merged, so that
on a mesh each device cuts its own part. Only where a tile lies on several devices do
these exchange what the cut axis holds.
"""

import dataclasses
import math
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from sparsejax.masks._search import zero_of
from sparsejax.masks.layout import Layout


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a weight is cut; see `cut`.

    Attributes:
      shape: of the weight.
      axes: those that are cut, in order.
      sizes: for each the length of a tile.
      batch: axes that stack layers.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    batch: tuple[int, ...]

    def split(self, x: jax.Array) -> jax.Array:
        """Return ``x`` with an axis of tiles, and one within them, for each cut one."""
        shape = list(x.shape)
        for axis, size in zip(self.axes[::-1], self.sizes[::-1], strict=True):
            shape[axis : axis + 1] = shape[axis] // size, size
        sharding = jax.typeof(x).sharding
        if not sharding.mesh.explicit_axes:
            return x.reshape(shape)
        return lax.reshape(x, shape, out_sharding=self._split_sharding(sharding))

    def merge(self, x: jax.Array, like: jax.Array) -> jax.Array:
        """Invert `split`; sharded as ``like``."""
        sharding = jax.typeof(like).sharding
        if not sharding.mesh.explicit_axes:
            return x.reshape(self.shape)
        return lax.reshape(x, self.shape, out_sharding=sharding)

    def total(self, x: jax.Array) -> jax.Array:
        """Add within each tile, float32; an axis that is cut becomes one of tiles.

        Elementwise and so in one order, while that of a reduction differs between
        backends and meshes.
        """
        x = self.split(x.astype(jnp.float32))
        for axis in self._within[::-1]:
            while x.shape[axis] > 1:
                half = x.shape[axis] // 2
                first, second, rest = jnp.split(x, [half, 2 * half], axis)
                x = jnp.concatenate([first + second, rest], axis)
            x = x.squeeze(axis)
        return x

    def any(self, mask: jax.Array) -> jax.Array:
        """Tell for each tile whether anything in it is True; shaped as by `total`."""
        return jnp.any(self.split(mask), axis=self._within) if self.axes else mask

    def spread(self, chosen: jax.Array, like: jax.Array) -> jax.Array:
        """Return a mask of the weight from one of its tiles; sharded as ``like``."""
        if not self.axes:
            return chosen
        tiled = jnp.expand_dims(chosen, self._within)
        shape = jax.eval_shape(self.split, like).shape
        return self.merge(jnp.broadcast_to(tiled, shape), like)

    def largest(self, keys: jax.Array, n: chex.Numeric, like: jax.Array) -> jax.Array:
        """Select the ``n`` largest keys of every tile, where one axis is cut.

        A key is selected if less than ``n`` of its tile are larger, or equal and
        before it. Nothing leaves a tile, so nothing leaves a device.

        Args:
          keys: as of `sparsejax.masks._search.keys_of`; a 0 is never selected.
          n: integer, traced or not, scalar or per stacked layer.
          like: array of the shape and sharding of the weight.

        Returns:
          Bool array like the weight.
        """
        (axis,) = self._within
        keys = self.split(keys)
        size = keys.shape[axis]
        place = lax.broadcasted_iota(jnp.int32, keys.shape, axis)

        def compare(j, rank):
            other = lax.dynamic_slice_in_dim(keys, j, 1, axis)
            beaten = (other > keys) | ((other == keys) & (j < place))
            return rank + beaten.astype(jnp.int32)

        # Unrolled, small groups are one pass over the array.
        none = jnp.zeros_like(keys, jnp.int32) + zero_of([keys])
        rank = lax.fori_loop(0, size, compare, none, unroll=min(size, 16))
        return self.merge((rank < self._per_tile(n)) & (keys > 0), like)

    def _split_sharding(self, sharding: NamedSharding) -> NamedSharding:
        """Return where tiles lie: where the leaf does, if no device has but a part."""
        mesh = sharding.mesh
        spec = [*sharding.spec, *[None] * (len(self.shape) - len(sharding.spec))]
        for axis, size in zip(self.axes[::-1], self.sizes[::-1], strict=True):
            names = spec[axis] or ()
            names = (names,) if isinstance(names, str) else names
            parts = math.prod(mesh.shape[name] for name in names)
            whole = self.shape[axis] // size % parts == 0
            spec[axis : axis + 1] = spec[axis] if whole else None, None
        return NamedSharding(mesh, jax.P(*spec))

    def _per_tile(self, n: chex.Numeric) -> jax.Array:
        """Return numbers of layers in a shape that fits what `split` returns."""
        shape = [n if i in self.batch else 1 for i, n in enumerate(self.shape)]
        n = jnp.broadcast_to(jnp.asarray(n), [self.shape[i] for i in self.batch])
        return jnp.expand_dims(n.reshape(shape), self._within)

    @property
    def _within(self) -> tuple[int, ...]:
        """The axes within tiles, of what `split` returns."""
        return tuple(axis + i + 1 for i, axis in enumerate(self.axes))


def cut(
    what: str, shape: tuple[int, ...], layout: Layout, tile: Mapping[str, int]
) -> Tiles:
    """Cut a weight of ``shape`` into tiles.

    Args:
      what: whose weight it is, for errors.
      shape: of the weight.
      layout: which axes are neurons and inputs.
      tile: how many "neurons" or "inputs" a tile has; 1 where it is not said.

    Raises:
      ValueError: the tiles do not divide the weight.
    """
    own = layout.resolve(len(shape))
    roles = {"neurons": own.outputs, "inputs": own.inputs}
    sizes = {}
    for role, size in tile.items():
        length = shape[roles[role][-1]] if roles[role] else 1
        if length % size:
            raise ValueError(
                f"{what}: tiles of {size} {role} must divide the last axis of the "
                f"{role}, which has length {length} in shape {shape}."
            )
        sizes[roles[role][-1]] = size
    axes = tuple(sorted(sizes))
    return Tiles(shape, axes, tuple(sizes[axis] for axis in axes), own.batch)
