"""A weight seen as [neurons, fan_in], and which leaves of a tree are sparsified."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey, keystr

Where = Callable[[str, Any], bool] | Mapping[str, float] | None


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a weight are neurons, inputs and stacked layers.

    What is neither is spatial. Negative axes count from the end. The default fits
    Flax's dense and convolution kernels, ``[..., in, out]``; depthwise and grouped
    kernels too, whose second last axis holds the inputs of one group.

    Attributes:
      outputs: axes of the neurons or output channels.
      inputs: axes of the input channels.
      batch: axes that stack independent layers, as ``nn.scan`` and ``nnx.vmap`` do.
        Each layer has its own budget and its own selection.

    Example:
      >>> from sparsejax import masks
      >>> conv = masks.Layout()
      >>> conv.matrix_shape((3, 3, 16, 32))
      (32, 144)
      >>> scanned = masks.Layout(batch=(0,))
      >>> scanned.matrix_shape((4, 16, 32)), scanned.layer_axes(3)
      ((4, 32, 16), (1, 2))
    """

    outputs: tuple[int, ...] = (-1,)
    inputs: tuple[int, ...] = (-2,)
    batch: tuple[int, ...] = ()

    def resolve(self, ndim: int) -> "Layout":
        """Return the layout with non-negative axes for an array of ``ndim`` axes.

        Raises:
          ValueError: an axis does not exist, or has two roles.
        """
        named = [*self.outputs, *self.inputs, *self.batch]
        resolved = [axis % ndim if -ndim <= axis < ndim else None for axis in named]
        if ndim == 1 and self == Layout():  # a vector has neurons and no inputs
            return Layout(outputs=(0,), inputs=())
        if None in resolved or len(set(resolved)) < len(resolved):
            raise ValueError(
                f"{self} must name different axes of an array of {ndim} dimensions."
            )
        place = lambda axes: tuple(axis % ndim for axis in axes)
        return Layout(place(self.outputs), place(self.inputs), place(self.batch))

    def fan_in_axes(self, ndim: int) -> tuple[int, ...]:
        """Return the axes over which one neuron sums."""
        own = self.resolve(ndim)
        return tuple(i for i in range(ndim) if i not in own.outputs + own.batch)

    def layer_axes(self, ndim: int) -> tuple[int, ...] | None:
        """Return the axes of one layer; ``None`` where nothing is stacked."""
        batch = self.resolve(ndim).batch
        return tuple(i for i in range(ndim) if i not in batch) if batch else None

    def layer_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return one layer's ``(neurons, inputs, *spatial)``.

        Axes of one role are merged, so that an attention projection
        ``[in, heads, head_dim]`` counts as the matrix that it is.
        """
        own = self.resolve(len(shape))
        roles = own.outputs + own.inputs + own.batch
        spatial = [n for i, n in enumerate(shape) if i not in roles]
        sizes = [
            math.prod(shape[i] for i in axes) for axes in (own.outputs, own.inputs)
        ]
        return (*sizes, *spatial) if own.inputs else (sizes[0], *spatial)

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of `to_matrix` of an array of ``shape``."""
        own = self.resolve(len(shape))
        batch = tuple(shape[i] for i in own.batch)
        neurons = math.prod(shape[i] for i in own.outputs)
        return (
            *batch,
            neurons,
            math.prod(shape[i] for i in self.fan_in_axes(len(shape))),
        )

    def to_matrix(self, weight: jax.Array) -> jax.Array:
        """Return ``weight`` as ``[*batch, neurons, fan_in]``.

        Within a neuron the inputs come first and the spatial axes after them, so that
        a convolution equals the same update on ``[out, in * kh * kw]``.
        """
        order = self._order(weight.ndim)
        return weight.transpose(order).reshape(self.matrix_shape(weight.shape))

    def from_matrix(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Invert `to_matrix` for a weight of ``shape``."""
        order = self._order(len(shape))
        unfolded = matrix.reshape([shape[i] for i in order])
        return unfolded.transpose([order.index(i) for i in range(len(shape))])

    def _order(self, ndim: int) -> tuple[int, ...]:
        own = self.resolve(ndim)
        order = own.batch + own.outputs + own.inputs
        return order + tuple(i for i in range(ndim) if i not in order)


class Leaf(NamedTuple):
    """A leaf that is to be sparse."""

    path: str
    shape: tuple[int, ...]
    layout: Layout
    sparsity: float | None  # its own; None: what the distribution gives it


def path_name(path: tuple[Any, ...]) -> str:
    """Return a key path as text, ``"block/0/kernel"``.

    The attribute that boxes of Flax (``nnx.Param``, ``nn.Partitioned``) keep their
    array in is left out, so that boxed and bare trees have the same names.
    """
    if path and isinstance(path[-1], GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by path, in tree order."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = path_name(path)
        if name in leaves:
            raise ValueError(
                f"Two leaves have the same path {name!r}; rename one of them, as paths "
                "must tell leaves apart."
            )
        leaves[name] = leaf
    return leaves


def select_leaves(
    params: Any,
    *,
    where: Where = None,
    layout: Mapping[str, Layout] | None = None,
) -> dict[str, Leaf]:
    """Choose the leaves that are to be sparse.

    Args:
      params: tree of arrays or `jax.ShapeDtypeStruct`.
      where: ``None`` for the default: floating-point leaves of two or more dimensions
        except embeddings, which are leaves with "embed" in their own name; a leaf
        called ``bias`` or ``scale`` is no weight however many dimensions it has. A
        predicate on (path, leaf). Or a dict from regex to sparsity: weights,
        embeddings included, whose path the regex is found in, get that sparsity
        (0: they stay dense) and leave the distribution; for all others the default
        holds; of several regexes that match, the first counts.
      layout: dict from regex to `Layout`, for weights that are not laid out as Flax
        lays them out; the first that is found in the path counts.

    Returns:
      Dict from path to `Leaf`, in tree order.

    Raises:
      ValueError: a regex matches nothing or is none, nothing is selected, a layout
        does not fit its leaf.
      TypeError: a selected leaf is not float32, bfloat16 or float16.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import masks
      >>> params = {"fc": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}}
      >>> list(masks.select_leaves(params))
      ['fc/kernel']
    """
    leaves = named_leaves(params)
    layouts = layouts_of(params, layout)
    if callable(where):
        chosen = {p: None for p, x in leaves.items() if _is_float(x) and where(p, x)}
        wish = "the predicate where= is true for no floating-point leaf"
    else:
        weights = {p: x for p, x in leaves.items() if _is_weight(p, x)}
        own = first_match("where", dict(where or {}), weights)
        chosen = {p: own.get(p) for p in weights if p in own or not _is_embedding(p)}
        chosen = {p: s for p, s in chosen.items() if s != 0}
        wish = "where= leaves no weight of two or more dimensions"
    if not chosen:
        raise ValueError(
            f"Nothing is to be sparse: {wish}. The leaves are: {_listed(leaves)}."
        )
    for path in chosen:
        if leaves[path].dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise TypeError(
                f"{path}: a sparse leaf must be float32, bfloat16 or float16, got "
                f"{leaves[path].dtype}; cast it, or leave it dense with where=."
            )
        try:
            layouts[path].resolve(leaves[path].ndim)
        except ValueError as error:
            raise ValueError(
                f"{path}: a sparse leaf must have neurons, got shape "
                f"{leaves[path].shape}: {error} Leave it dense with where=."
            ) from None
    return {p: Leaf(p, leaves[p].shape, layouts[p], s) for p, s in chosen.items()}


def _is_float(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _is_weight(path: str, leaf) -> bool:
    name = path.rsplit("/", 1)[-1]
    shaped = leaf.ndim >= 2 and leaf.size > 0
    return _is_float(leaf) and shaped and name not in ("bias", "scale")


def _is_embedding(path: str) -> bool:
    return "embed" in path.rsplit("/", 1)[-1].lower()


def layouts_of(
    params: Any, overrides: Mapping[str, Layout] | None = None
) -> dict[str, Layout]:
    """Return the layout of each leaf by path: an override, or what its path tells.

    Attention projections are known by their names and shapes, ``query``, ``key`` and
    ``value`` [in, heads, head_dim] and ``out`` [heads, head_dim, out], with stacked
    layers in front; for all else it is the default `Layout`.

    Raises:
      ValueError: a pattern matches nothing, or a layout does not fit its leaf.
    """
    leaves = named_leaves(params)
    chosen = first_match("layout", dict(overrides or {}), leaves)
    for path, leaf in leaves.items():
        if path not in chosen:
            chosen[path] = _default_layout(path, leaf.ndim, leaves)
        elif leaf.ndim:
            try:
                chosen[path].resolve(leaf.ndim)
            except ValueError as error:
                raise ValueError(f"layout= for {path}: {error}") from None
    return chosen


def _default_layout(path: str, ndim: int, leaves: Mapping[str, Any]) -> Layout:
    """Return Flax's layout; attention is known by its ``query`` and ``out``."""
    *module, projection, name = ("", "", *path.split("/"))
    siblings = ["/".join([*module, p, name]).strip("/") for p in ("query", "out")]
    if name == "kernel" and ndim >= 3 and all(s in leaves for s in siblings):
        batch = tuple(range(ndim - 3))
        if projection in ("query", "key", "value"):
            return Layout(outputs=(-2, -1), inputs=(-3,), batch=batch)
        if projection == "out":
            return Layout(outputs=(-1,), inputs=(-3, -2), batch=batch)
    return Layout()


def first_match(argument: str, patterns: dict[str, Any], paths) -> dict[str, Any]:
    """Map each path to the value of the first pattern found in it."""
    found = {}
    for pattern, value in patterns.items():
        try:
            matched = [path for path in paths if re.search(pattern, path)]
        except re.error as error:
            raise ValueError(
                f"{argument}= takes regular expressions; {pattern!r} is none: {error}."
            ) from None
        if not matched:
            raise ValueError(
                f"{argument}=: the pattern {pattern!r} must match a weight and matches "
                f"none. The paths are: {_listed(paths)}. Correct or remove it."
            )
        for path in matched:
            found.setdefault(path, value)
    return found


def _listed(paths, most: int = 12) -> str:
    paths = list(paths)
    more = f", ... ({len(paths) - most} more)" if len(paths) > most else ""
    return ", ".join(paths[:most]) + more
