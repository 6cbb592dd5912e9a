"""What layers store about their widths, put right after their parameters were sliced.

A layer of Flax has attributes that repeat the shapes of its parameters. The table here
says for each class how to set them. Axes are counted from the end, so that layers
stacked for ``nnx.scan`` are treated as single ones are.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from sparsejax.compaction.errors import CompactionError
from sparsejax.compaction.exact_attention import at_full_depth
from sparsejax.compaction.exact_norms import (
    averages_features,
    divide_by_full_count,
    groups_left,
)
from sparsejax.compaction.plan import Plan


@dataclasses.dataclass(frozen=True)
class Sliced:
    """What a plan removed from the parameters of one module.

    The methods take a parameter's name as seen from the module, ``"kernel"`` or
    ``"query/kernel"``.

    Attributes:
      path: the module's path in the model.
      module: the module; its parameters are sliced already.
      plan: of the whole model.
      shapes: the shapes that parameters had, by their path in the model.
      names: the paths of parameters by the identity of their ``nnx.Variable``.
    """

    path: str
    module: Any
    plan: Plan
    shapes: Mapping[str, tuple[int, ...]]
    names: Mapping[int, str]

    def name(self, parameter: str) -> str:
        """Return a parameter's path in the model; one that is shared has only one."""
        node = self.module
        for key in parameter.split("/"):
            node = node[int(key)] if key.isdigit() else getattr(node, key)
        return self.names[id(node)]

    def full_shape(self, parameter: str) -> tuple[int, ...]:
        """Return the shape that a parameter had."""
        return self.shapes[self.name(parameter)]

    def kept(self, parameter: str, axis: int) -> np.ndarray:
        """Return the indices that are left of an axis, int [n], sorted."""
        shape = self.full_shape(parameter)
        axes = self.plan.keep.get(self.name(parameter), (None,) * len(shape))
        kept = axes[axis]
        return np.arange(shape[axis]) if kept is None else kept

    def factors(self, parameter: str, axis: int) -> tuple[int, ...] | None:
        """Return how many of each factor are left of an axis that is a product.

        ``None`` where the axis is not one, as far as the model's operations tell.
        """
        axis %= len(self.full_shape(parameter))
        return self.plan.factors.get((self.name(parameter), axis))


Fix = Callable[[Any, Sliced], None]
_FIXES: dict[type, Fix] = {}


def register_compact(module_type: type, fix: Fix) -> None:
    """Say how modules of a class follow when their parameters shrink.

    For modules that store a width, as one that reshapes by ``self.heads``. A class may
    have a method ``__compact__(self)`` instead. The layers of Flax are registered;
    other modules stay as they are.

    Args:
      module_type: a class of modules; its subclasses are treated alike.
      fix: called with the module, whose parameters and submodules are sliced already,
        and a `Sliced`; it sets the module's attributes.

    Raises:
      TypeError: ``module_type`` is no class, or ``fix`` cannot be called.

    Example:
      >>> from flax import nnx
      >>> from sparsejax import compaction
      >>> class Gate(nnx.Module):
      ...     def __init__(self, features, *, rngs):
      ...         self.features = features
      ...         self.both = nnx.Linear(features, 2 * features, rngs=rngs)
      ...
      ...     def __call__(self, x):
      ...         return nnx.glu(self.both(x).reshape(-1, 2 * self.features))
      >>> def fix(gate, sliced):
      ...     gate.features = gate.both.out_features // 2
      >>> compaction.register_compact(Gate, fix)
    """
    if not isinstance(module_type, type) or not callable(fix):
        raise TypeError(
            "register_compact(module_type, fix) takes a class and a function of a "
            f"module and a Sliced, got {module_type!r} and {fix!r}."
        )
    _FIXES[module_type] = fix


def fix(sliced: Sliced) -> None:
    """Make a module's attributes fit its sliced parameters, in place."""
    module = sliced.module
    known = next((cls for cls in type(module).__mro__ if cls in _FIXES), None)
    if known is not None:
        _FIXES[known](module, sliced)
    if hasattr(type(module), "__compact__"):
        module.__compact__()


def bias_shape(layer: Any) -> tuple[int, ...] | None:
    """Return the shape of a layer's bias, whether or not it has one.

    ``None`` for a layer that would take no bias over its output channels.
    """
    if isinstance(layer, nnx.LinearGeneral):
        n_in, n_out = len(layer.in_features), len(layer.out_features)
        return layer.kernel.shape[: -n_in - n_out] + layer.kernel.shape[-n_out:]
    if isinstance(layer, nnx.Linear):
        return layer.kernel.shape[:-2] + layer.kernel.shape[-1:]
    if isinstance(layer, nnx.Conv | nnx.ConvTranspose):
        out = -2 if getattr(layer, "transpose_kernel", False) else -1
        shape = layer.kernel.shape
        return shape[: -len(layer.kernel_size) - 2] + (shape[out],)
    return None


def _linear(layer, _):
    *_, layer.in_features, layer.out_features = layer.kernel.shape


def _linear_general(layer, _):
    n_in, n_out = len(layer.in_features), len(layer.out_features)
    shape = layer.kernel.shape[-n_in - n_out :]
    layer.in_features, layer.out_features = shape[:n_in], shape[n_in:]


def _einsum(layer, _):
    layer.kernel_shape = layer.kernel.shape[-len(layer.kernel_shape) :]
    if layer.bias is not None:
        layer.bias_shape = layer.bias.shape[-len(layer.bias_shape) :]


def _conv(layer, sliced):
    groups = sliced.plan.feature_groups.get(sliced.name("kernel"))
    if groups is not None:
        layer.feature_group_count = groups
    layer.kernel_shape = layer.kernel.shape[-len(layer.kernel_size) - 2 :]
    *_, per_group, layer.out_features = layer.kernel_shape
    layer.in_features = per_group * layer.feature_group_count


def _conv_transpose(layer, _):
    layer.kernel_shape = layer.kernel.shape[-len(layer.kernel_size) - 2 :]
    channels = layer.kernel_shape[-2:]
    if layer.transpose_kernel:
        channels = channels[::-1]
    layer.in_features, layer.out_features = channels


def _embed(layer, _):
    *_, layer.num_embeddings, layer.features = layer.embedding.shape


def _per_channel_norm(layer, _):
    if (parameter := _norm_parameter(layer)) is not None:
        layer.num_features = getattr(layer, parameter).shape[-1]


def _norm_parameter(layer) -> str | None:
    names = ("scale", "bias", "mean")
    return next((n for n in names if getattr(layer, n, None) is not None), None)


def _norm_over_features(layer, sliced):
    """Fix a LayerNorm or RMSNorm.

    One without parameters may have lost features, too. It divides by as many as it
    says that it has, where that is exact; where not, it stays as it is.
    """
    parameter = _norm_parameter(layer)
    if parameter is None:
        with contextlib.suppress(CompactionError):
            divide_by_full_count(layer, sliced.path, layer.num_features)
        return
    full, left = sliced.full_shape(parameter)[-1], getattr(layer, parameter).shape[-1]
    if full != left and averages_features(layer):
        divide_by_full_count(layer, sliced.path, full)
    layer.num_features = left


def _group_norm(layer, sliced):
    parameter = _norm_parameter(layer)
    if parameter is None:
        return
    kept, full_size = sliced.kept(parameter, -1), layer.group_size
    layer.num_groups, layer.group_size = groups_left(kept, full_size, sliced.path)
    if layer.group_size != full_size:
        divide_by_full_count(layer, sliced.path, full_size)


def _attention(layer, sliced):
    """Set the sizes of an ``nnx.MultiHeadAttention``, which has one size of heads."""
    *_, features, heads, size = layer.query.kernel.shape
    *_, kv_features, kv_heads, value_size = layer.value.kernel.shape
    if value_size != size:
        raise CompactionError(
            f"{sliced.path}: an nnx.MultiHeadAttention has one size of heads; {size} "
            f"dimensions are left of query and key and {value_size} of value and out. "
            'Remove equally many, or use backend="replay".'
        )
    if kv_heads != heads and (not kv_heads or heads % kv_heads):
        raise CompactionError(
            f"{sliced.path}: the {heads} heads that are left must be a multiple of the "
            f"{kv_heads} heads of keys and values; remove whole groups of heads."
        )
    if size != layer.head_dim or not heads:
        layer.attention_fn = at_full_depth(layer.attention_fn, layer.head_dim)
    layer.in_features, layer.in_kv_features = features, kv_features
    layer.num_heads, layer.num_kv_heads, layer.head_dim = heads, kv_heads, size
    layer.qkv_features = heads * size
    layer.out_features = layer.out.kernel.shape[-1]


def _recurrent_cell(cell, _):
    inputs, hidden = ("ii", "hi") if hasattr(cell, "ii") else ("dense_i", "dense_h")
    cell.in_features = getattr(cell, inputs).kernel.shape[-2]
    cell.hidden_features = getattr(cell, hidden).kernel.shape[-2]


def equal_sizes(model: nnx.Module) -> list[tuple[tuple[str, int], ...]]:
    """List the axes of parameters that must keep equally many indices.

    Those are the sizes of the heads of every ``nnx.MultiHeadAttention``, whose queries
    and keys may lose other dimensions than its values, but as many.

    Args:
      model: the full model.

    Returns:
      Tuples of (path of a parameter, axis).
    """
    names, equal = parameter_names(model), []
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.MultiHeadAttention):
            layers = (module.query, module.key, module.value, module.out)
            kernels = [layer.kernel for layer in layers]
            axes = [kernel.ndim - 1 for kernel in kernels[:3]] + [kernels[3].ndim - 2]
            paths = [names[id(kernel)] for kernel in kernels]
            equal.append(tuple(zip(paths, axes, strict=True)))
    return equal


def parameter_names(model: nnx.Module) -> dict[int, str]:
    """Return the path of every ``nnx.Variable`` by its identity.

    A shared one has the path that ``nnx.state`` gives it.
    """
    return {
        id(node): "/".join(map(str, path))
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Variable)
    }


_FIXES.update(
    {
        nnx.Linear: _linear,
        nnx.LinearGeneral: _linear_general,
        nnx.Einsum: _einsum,
        nnx.Conv: _conv,
        nnx.ConvTranspose: _conv_transpose,
        nnx.Embed: _embed,
        nnx.BatchNorm: _per_channel_norm,
        nnx.InstanceNorm: _per_channel_norm,
        nnx.LayerNorm: _norm_over_features,
        nnx.RMSNorm: _norm_over_features,
        nnx.GroupNorm: _group_norm,
        nnx.MultiHeadAttention: _attention,
        nnx.SimpleCell: _recurrent_cell,
        nnx.GRUCell: _recurrent_cell,
        nnx.LSTMCell: _recurrent_cell,
        nnx.OptimizedLSTMCell: _recurrent_cell,
    }
)
