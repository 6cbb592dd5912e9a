"""Compacted Linen models, experimental: layers that take their widths from variables.

Linen modules say their widths in attributes and check every variable against them.
Here an interceptor sets the attributes of Flax's layers from the variables, at each
call. The back-end ``replay`` needs no such thing: prefer it unless the module itself is
needed, as for training.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn

from sparsejax.compaction.errors import CompactionError
from sparsejax.compaction.exact_attention import at_full_depth
from sparsejax.compaction.exact_norms import (
    averages_features,
    groups_left,
    over_features,
    over_groups,
    refusal,
)
from sparsejax.compaction.plan import Plan
from sparsejax.masks.layout import named_leaves


def linen_apply(
    module: nn.Module, full_variables: Any, plan: Any = None
) -> Callable[..., Any]:
    """Return ``apply`` of a Linen module for variables that were compacted.

    Experimental. Known layers are ``Dense``, ``DenseGeneral``, ``Einsum``, ``Embed``,
    convolutions, norms and ``MultiHeadDotProductAttention``, inside ``nn.scan``,
    ``nn.remat`` and other transformations, too. Norms and attention compute with the
    constants of the full model.

    Args:
      module: the module, with the widths of the full model.
      full_variables: its variables before compaction, arrays or
        ``jax.ShapeDtypeStruct``, as ``jax.eval_shape(module.init, ...)`` makes them.
      plan: the report or the `Plan`; needed where a ``GroupNorm`` lost channels.

    Returns:
      ``apply(variables, *args, **kwargs)``, as ``module.apply`` takes them.

    Raises:
      CompactionError: when called, where a layer would not compute the same.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from sparsejax.compaction.linen import linen_apply
      >>> full = {"params": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
      >>> small = {"params": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
      >>> apply = linen_apply(nn.Dense(4), full)
      >>> apply(small, jnp.ones((1, 3))).shape
      (1, 2)
    """
    unboxed = named_leaves(nn.meta.unbox(full_variables))
    shapes = {path: leaf.shape for path, leaf in unboxed.items()}
    plan = getattr(plan, "plan", plan)

    def interceptor(next_fun, args, kwargs, context):
        layer = _Layer(context.module, shapes, plan)
        if context.module.scope is None:
            return next_fun(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(context.module, _NORMS):
            if layer.lost_features():
                return layer.normalised(*args, **kwargs)
        inputs = args[0] if args else next(iter(kwargs.values()), None)
        with _attributes(context.module, layer.widths(inputs)):
            return next_fun(*args, **kwargs)

    def apply(variables, *args, **kwargs):
        with nn.intercept_methods(interceptor):
            return module.apply(variables, *args, **kwargs)

    return apply


_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


@contextlib.contextmanager
def _attributes(module: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """Give a frozen module other attributes for a while."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A bound module and the full model's shapes of its parameters."""

    module: Any
    shapes: Mapping[str, tuple[int, ...]]
    plan: Plan | None

    @property
    def path(self) -> str:
        return "/".join(("params", *self.module.path))

    def parameter(self, name: str) -> Any:
        """Return a parameter of the layer or of a layer in it, or None."""
        first, *rest = name.split("/")
        if not self.module.has_variable("params", first):
            return None
        value = nn.meta.unbox(self.module.get_variable("params", first))
        for key in rest:
            value = value[key]
        return value

    def full_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape a parameter had; a stacked one has its stack in front."""
        try:
            return self.shapes[f"{self.path}/{name}"]
        except KeyError:
            raise CompactionError(
                f"linen_apply(full_variables=...) must have {self.path}/{name}; its "
                f"paths are: {', '.join(self.shapes)}."
            ) from None

    def widths(self, inputs: Any) -> dict[str, Any]:
        """Return the attributes that follow from the shapes of the parameters."""
        module = self.module
        if isinstance(module, nn.MultiHeadDotProductAttention):
            return self._attention()
        name = "embedding" if isinstance(module, nn.Embed) else "kernel"
        if (weight := self.parameter(name)) is None:
            return {}
        widths = self._widths(weight.shape, inputs)
        # Linen traces the initialiser to check shapes; many divide by the fan-in.
        return widths and widths | {f"{name}_init": nn.initializers.zeros}

    def _widths(self, shape: tuple[int, ...], inputs: Any) -> dict[str, Any]:
        match module := self.module:
            case nn.Embed():
                return {"num_embeddings": shape[0], "features": shape[1]}
            case nn.Dense() | nn.DenseGeneral(features=int()):
                return {"features": shape[-1]}
            case nn.DenseGeneral(features=Sequence() as features):
                return {"features": shape[-len(features) :]}
            case nn.Einsum():
                return {"shape": shape}
            case nn.ConvTranspose():
                return {"features": shape[-2 if module.transpose_kernel else -1]}
            case nn.Conv() | nn.ConvLocal():
                groups = module.feature_group_count
                if groups > 1:
                    groups = inputs.shape[-1] // shape[-2]
                return {"features": shape[-1], "feature_group_count": groups}
        return {}

    def _attention(self) -> dict[str, Any]:
        query = self.parameter("query/kernel")
        if query is None:
            return {}
        _, heads, depth = query.shape
        full_depth = self.full_shape("query/kernel")[-1]
        # The heads' sizes are those of the kernels; that they divide is checked, still.
        values = {"num_heads": max(heads, 1), "qkv_features": max(heads * depth, 1)}
        if depth != full_depth or not heads:
            function = at_full_depth(self.module.attention_fn, full_depth)
            values["attention_fn"] = function
        return values

    def norm_parameter(self) -> str:
        """Return the name of a norm's scale, or of its bias where it has no scale."""
        for name in ("scale", "bias"):
            if self.parameter(name) is not None:
                return name
        raise CompactionError(
            f"{self.path}: whether a {type(self.module).__name__} without scale and "
            'bias lost features cannot be known; use backend="replay".'
        )

    def lost_features(self) -> bool:
        """Tell whether a norm averages over fewer features than it did."""
        name = self.norm_parameter()
        over_groups = isinstance(self.module, nn.GroupNorm)
        lost = self.parameter(name).shape[-1] != self.full_shape(name)[-1]
        return lost and (over_groups or averages_features(self.module))

    def normalised(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Return what the norm puts out, by the counts of the full model."""
        module, name = self.module, self.norm_parameter()
        centred = not isinstance(module, nn.RMSNorm)
        if reason := refusal(module, centred=centred):
            raise self._refused(reason)
        if not module.force_float32_reductions:
            raise self._refused("has force_float32_reductions=False")
        scale, bias = self.parameter("scale"), self.parameter("bias")
        full = self.full_shape(name)[-1]
        if not isinstance(module, nn.GroupNorm):
            return over_features(
                module, x, scale, bias, full, mask=mask, centred=centred
            )
        kept = None if self.plan is None else self.plan.keep[f"{self.path}/{name}"][-1]
        if kept is None:
            raise self._refused("has groups, of which a plan tells; pass plan=report")
        if mask is not None:
            raise self._refused("is called with a mask")
        full_size = module.group_size or full // (module.num_groups or 1)
        left = groups_left(kept, full_size, self.path)
        return over_groups(module, x, scale, bias, left, full_size)

    def _refused(self, reason: str) -> CompactionError:
        return CompactionError(
            f"{self.path}: a {type(self.module).__name__} cannot lose channels "
            f"exactly: it {reason}."
        )
