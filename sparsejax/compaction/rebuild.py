"""Back-end two: the same modules with smaller parameters, to train or to serve.

Parameters are sliced by a plan, the attributes of layers follow (`layers`), and norms
and attention keep the constants that they were trained with (`exact_norms`,
`exact_attention`). What other modules store of widths is not known here: whoever
rebuilds compares the result with the full model.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.compaction.errors import CompactionError
from sparsejax.compaction.layers import Sliced, bias_shape, fix, parameter_names
from sparsejax.compaction.plan import Plan
from sparsejax.compaction.slicing import take
from sparsejax.masks.layout import named_leaves

M = TypeVar("M", bound=nnx.Module)


def rebuild(model: M, plan: Plan) -> M:
    """Return a smaller module of the same classes.

    Args:
      model: the full module; it stays as it is. Its parameters are arrays, or
        ``jax.ShapeDtypeStruct`` as ``nnx.eval_shape`` makes them.
      plan: what is left of each parameter, made for this model.

    Returns:
      A new module. Norms that lost channels become subclasses that divide by the
      counts of the full model. Parameters keep their type, their metadata and, as far
      as the new shapes allow it, their sharding.

    Raises:
      CompactionError: the plan was made for another model, or a layer cannot compute
        the same with what is left of it.
    """
    graphdef, state = nnx.split(model)
    named, treedef = named_leaves(state), jax.tree.structure(state)
    check_plan(plan, named)
    untouched = lambda leaf: (None,) * np.ndim(leaf)
    left = [
        take(leaf, plan.keep.get(path, untouched(leaf))) for path, leaf in named.items()
    ]
    small = nnx.merge(graphdef, treedef.unflatten(left))
    shapes = {path: np.shape(leaf) for path, leaf in named.items()}
    names = parameter_names(small)
    folds = dict(plan.folds)
    for keys, module in list(nnx.iter_modules(small)):
        path = "/".join(map(str, keys)) or "<model>"
        fix(Sliced(path, module, plan, shapes, names))
        kernel = names.get(id(getattr(module, "kernel", None)))
        if kernel in folds:
            _add_to_bias(module, path, folds.pop(kernel))
    if folds:
        raise CompactionError(
            f"The constants of {', '.join(folds)} cannot be folded: no layer of this "
            'model owns such a kernel. Pass constants="keep".'
        )
    return small


def check_plan(plan: Plan, leaves: dict[str, Any]) -> None:
    """Raise CompactionError unless a plan fits the parameters, given by path."""
    for path, keep in plan.keep.items():
        if path not in leaves:
            raise CompactionError(
                f"The plan is for another model: it has a parameter {path} and this "
                f"model has not. Its parameters are: {', '.join(leaves)}."
            )
        shape = np.shape(leaves[path])
        highest = [-1 if k is None else int(k.max(initial=-1)) for k in keep]
        if len(keep) != len(shape) or any(
            last >= n for last, n in zip(highest, shape, strict=True)
        ):
            raise CompactionError(
                f"The plan is for another model: {path} has the shape {shape}, and the "
                f"plan keeps indices up to {highest} of its axes (-1: all, or none)."
            )


def _add_to_bias(layer: Any, path: str, constant: np.ndarray) -> None:
    """Add a constant to what a layer puts out, in place."""
    kernel, shape = layer.kernel, bias_shape(layer)
    if shape is None or math.prod(shape) != np.size(constant):
        raise CompactionError(
            f"{path}: a constant of shape {np.shape(constant)} must go into the bias "
            f"of a {type(layer).__name__} with a kernel of shape {kernel.shape}, and "
            'that has no such bias. Pass constants="keep".'
        )
    abstract = isinstance(kernel.get_value(), jax.ShapeDtypeStruct)
    if layer.bias is None:
        make = jax.ShapeDtypeStruct if abstract else jnp.zeros
        layer.bias, layer.use_bias = nnx.Param(make(shape, kernel.dtype)), True
    if not abstract:
        bias = layer.bias[...]
        # Not `bias[...] +=`, which would write into a NumPy array of the full model.
        layer.bias.set_value(bias + jnp.asarray(constant, bias.dtype).reshape(shape))


def foldable(model: nnx.Module) -> Callable[[str], bool]:
    """Return what says of a kernel's path whether its layer can take up a constant."""
    names = parameter_names(model)
    able = {
        names[id(kernel)]
        for _, module in nnx.iter_modules(model)
        if isinstance(kernel := getattr(module, "kernel", None), nnx.Variable)
        and bias_shape(module) is not None
    }
    return able.__contains__
