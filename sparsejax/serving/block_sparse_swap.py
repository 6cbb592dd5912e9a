"""A back-end of compaction: the same model with layers that run from blocks."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.compaction.errors import CompactionError
from sparsejax.compaction.layers import parameter_names
from sparsejax.compaction.program import trace
from sparsejax.compaction.subjects import check_unchanged, of_model
from sparsejax.compaction.verify import another_batch, compare, tolerance
from sparsejax.serving.block_sparse_choice import Measured, describe, measure_forms
from sparsejax.serving.block_sparse_index import Blocks
from sparsejax.serving.block_sparse_layers import BlockSparseConv, BlockSparseLinear

M = TypeVar("M", bound=nnx.Module)
Pairs = Iterable[tuple[Any, Any]]


class Swapped(NamedTuple):
    """What became of the layers.

    Attributes:
      measured: by the kernel's path, the times of each form. Pass it as ``measured=``
        to have the same layers again.
      forms: by the kernel's path, the form that was chosen; "dense": the layer stayed.
      density: by the kernel's path, the part of the weights that is in blocks.
      max_error: largest difference of outputs; None if they were not compared.
      scale: largest output; None if they were not compared.
    """

    measured: dict[str, Measured]
    forms: dict[str, str]
    density: dict[str, float]
    max_error: float | None
    scale: float | None

    def __str__(self) -> str:
        lines = []
        for path, measured in self.measured.items():
            times = {name: 1e3 * value for name, value in measured.seconds.items()}
            told = ", ".join(f"{name} {value:.3g} ms" for name, value in times.items())
            form, density = self.forms[path], self.density[path]
            lines.append(f"{path} ({density:.0%}): {form}; {told}")
        return "\n".join(lines)


def with_blocks(
    model: M,
    blocks: Mapping[str, Pairs],
    *example_inputs: Any,
    measured: Mapping[str, Measured] | None = None,
    verify: bool = True,
) -> tuple[M, Swapped]:
    """Return a model whose layers run from the blocks of their kernels, where it pays.

    All forms of each layer are measured on the shapes that it has for the example
    inputs, whose batch should be the one that is served, and the fastest is taken;
    where that does not save a tenth of the dense layer's time, this stays. A
    measurement that was stored is taken as it is, so that the result is the same in
    every run; it must be of this kind of device and of these shapes.

    Remove channels first: `sparsejax.compaction.compact` knows the layers of Flax and
    not those made here. ``Blocks(shape, pairs).take(report.plan.keep[path]).blocks``
    are then the blocks of what is left of a kernel.

    Args:
      model: an ``nnx.Module`` in evaluation mode, masked; it stays as it is.
      blocks: by the path of a kernel of ``nnx.Conv`` (of images, in one group and
        without dilation) or ``nnx.Linear``, pairs of rows and columns as `Blocks` takes
        them.
      *example_inputs: what the model is called with, arrays or
        ``jax.ShapeDtypeStruct``.
      measured: by path, what an earlier call or `measure_forms` measured; layers that
        it lacks are measured.
      verify: whether to compare the outputs with the model's, on random inputs.

    Returns:
      The new model, with a `BlockSparseConv` or `BlockSparseLinear` for each layer that
      was swapped, and a `Swapped`.

    Raises:
      CompactionError: a path is no such kernel, weights outside of its blocks are not
        zero, the layer is never called, the model is in training mode, or the outputs
        differ.
      ValueError, TypeError: blocks do not fit their kernel, or a measurement is of
        other shapes, blocks or another device.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from flax import nnx
      >>> from sparsejax import serving
      >>> model = nnx.Sequential(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), nnx.relu)
      >>> pairs = [(np.arange(4), np.arange(0, 64, 4)), (np.arange(4, 8), np.arange(9))]
      >>> mask = serving.Blocks((64, 8), pairs).mask
      >>> model.layers[0].kernel.set_value(model.layers[0].kernel[...] * mask)
      >>> fast, swapped = serving.with_blocks(
      ...     model, {"layers/0/kernel": pairs}, jnp.ones((16, 64)))
      >>> swapped.forms["layers/0/kernel"] in ("dense", "gathered", "padded")
      True
    """
    check_unchanged(model, example_inputs)
    small = nnx.clone(model)
    layers = _layers(small, blocks)
    calls = _calls(model, list(layers), example_inputs)
    own = {path: _blocks(path, layer, blocks[path]) for path, layer in layers.items()}
    done = {}
    for path, layer in layers.items():
        _check_zeros(path, layer, own[path])
        stored = (measured or {}).get(path)
        done[path] = _measure(path, layer, own[path], calls[path], stored)
    forms = {path: one.best for path, one in done.items()}
    for path, form in forms.items():
        if form != "dense":
            _become_block_sparse(layers[path], own[path], form)
    error, scale = _verified(model, small, example_inputs) if verify else (None, None)
    density = {path: one.density for path, one in own.items()}
    return small, Swapped(done, forms, density, error, scale)


def _layers(model: nnx.Module, paths: Iterable[str]) -> dict[str, Any]:
    """Return the layers of kernels by path; raise where one cannot be swapped."""
    names = parameter_names(model)
    owners = {
        names[id(kernel)]: module
        for _, module in nnx.iter_modules(model)
        if isinstance(kernel := getattr(module, "kernel", None), nnx.Variable)
    }
    layers = {}
    for path in paths:
        if path not in owners:
            raise CompactionError(
                f"with_blocks: {path} must be the kernel of a layer and is none. The "
                f"kernels are: {', '.join(owners)}."
            )
        if wrong := _unsupported(owners[path]):
            raise CompactionError(
                f"with_blocks: {path} must belong to an nnx.Conv of images, in one "
                "group, without dilation, mask or a function of its own, or to an "
                f"nnx.Linear; it belongs to {wrong}. Leave it out."
            )
        layers[path] = owners[path]
    return layers


def _blocks(path: str, layer: Any, pairs: Pairs) -> Blocks:
    try:
        blocks = Blocks(layer.kernel.shape, pairs)
    except (ValueError, TypeError) as error:
        raise type(error)(f"with_blocks: {path}: {error}") from error
    if not blocks.blocks:
        raise ValueError(
            f"with_blocks: {path} must have at least one block, got none; leave out a "
            "layer that stays dense."
        )
    return blocks


def _unsupported(layer: Any) -> str:
    """Return what a layer has that blocks have not; empty where it has nothing."""
    if type(layer) not in (nnx.Conv, nnx.Linear):
        return f"a {type(layer).__name__}"
    allowed: dict[str, tuple[Any, ...]] = {"preferred_element_type": (None,)}
    if isinstance(layer, nnx.Linear):
        allowed["dot_general"] = (jax.lax.dot_general,)
    else:
        allowed |= {
            "conv_general_dilated": (jax.lax.conv_general_dilated,),
            "feature_group_count": (1,),
            "input_dilation": (None, 1, (1, 1), [1, 1]),
            "kernel_dilation": (None, 1, (1, 1), [1, 1]),
            "mask": (None,),
        }
        if len(layer.kernel_size) != 2:
            return f"an nnx.Conv with kernel_size={layer.kernel_size}"
        if isinstance(layer.padding, str) and layer.padding not in ("SAME", "VALID"):
            return f"an nnx.Conv with padding={layer.padding!r}"
    for name, values in allowed.items():
        if (value := getattr(layer, name)) not in values:
            return f"an nnx.{type(layer).__name__} with {name}={value!r}"
    return ""


def _calls(
    model: nnx.Module, paths: Sequence[str], inputs: tuple[Any, ...]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return what each layer is called with."""
    watched = nnx.clone(model)
    seen: dict[str, set[jax.ShapeDtypeStruct]] = {path: set() for path in paths}

    def watch(layer: Any, inputs: set[jax.ShapeDtypeStruct]) -> None:
        cls = type(layer)

        def call(self, x: jax.Array) -> jax.Array:
            inputs.add(jax.ShapeDtypeStruct(x.shape, x.dtype))
            return cls.__call__(self, x)

        watching = type(cls.__name__, (cls,), {"__call__": call})
        object.__setattr__(layer, "__class__", watching)

    for path, layer in _layers(watched, paths).items():
        watch(layer, seen[path])
    subject = of_model(watched)
    jax.eval_shape(subject.fn, subject.arrays, *inputs)
    for path, found in seen.items():
        if len(found) != 1:
            raise CompactionError(
                f"with_blocks: the layer of {path} must be called with inputs of one "
                f"shape, to be measured; it is called with {sorted(map(str, found))}. "
                "Leave it out."
            )
    return {path: found.pop() for path, found in seen.items()}


def _check_zeros(path: str, layer: Any, blocks: Blocks) -> None:
    outside = np.count_nonzero(np.asarray(layer.kernel[...])[~blocks.mask])
    if outside:
        raise CompactionError(
            f"with_blocks: {path} must be zero outside of its blocks, and {outside} of "
            f"its weights there are not. Give all its blocks, or mask it with "
            "Blocks(shape, pairs).mask and train it so."
        )


def _measure(
    path: str,
    layer: Any,
    blocks: Blocks,
    x: jax.ShapeDtypeStruct,
    stored: Measured | None,
) -> Measured:
    """Return the stored measurement of a layer, or a new one."""
    shape, options = x.shape, {}
    if isinstance(layer, nnx.Conv):
        shape = (math.prod(x.shape[:-3]), *x.shape[-3:])
        options = {"strides": layer.strides or 1, "padding": layer.padding}
    dtype = layer.dtype or jnp.result_type(x.dtype, layer.kernel.dtype)
    if stored is None:
        return measure_forms(blocks, shape, dtype, **options)
    wanted = describe(blocks, shape, dtype, **options)
    if stored.what != wanted:
        raise ValueError(
            f"with_blocks(measured=...): {path} needs a measurement of {wanted}, got "
            f"one of {stored.what}; leave it out to measure anew."
        )
    return stored


def _become_block_sparse(layer: Any, blocks: Blocks, form: str) -> None:
    """Make a layer one of blocks, in place, for whoever refers to it."""
    if form == "unfolded":
        blocks, form = Blocks.full(blocks.shape), "gathered"
    options = {
        "form": form,
        "dtype": layer.dtype,
        "precision": layer.precision,
        "promote_dtype": layer.promote_dtype,
    }
    weights = blocks.split(layer.kernel[...])
    bias = None if layer.bias is None else layer.bias[...]
    if isinstance(layer, nnx.Conv):
        options |= {"strides": layer.strides or 1, "padding": layer.padding}
        new = BlockSparseConv(weights, bias, blocks, **options)
    else:
        new = BlockSparseLinear(weights, bias, blocks, **options)
    vars(layer).clear()
    vars(layer).update(vars(new))
    object.__setattr__(layer, "__class__", type(new))


def _verified(
    model: nnx.Module, small: nnx.Module, inputs: tuple[Any, ...]
) -> tuple[float, float]:
    """Return the largest difference of outputs and the largest output."""
    masked = of_model(model)
    others = another_batch(masked, inputs)
    error, scale = compare(masked, of_model(small), others)
    program = trace(masked.fn, masked.arrays, *others).program
    allowed = tolerance(program) * scale
    if error > allowed:
        raise CompactionError(
            f"The model with blocks differs from the masked one by {error:.3g} at "
            f"outputs up to {scale:.3g}; rounding explains {allowed:.3g}."
        )
    return error, scale
