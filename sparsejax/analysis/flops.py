"""How many floating-point operations a call costs, read from its jaxpr."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

from sparsejax._calls import CALLS


def flops(fn_or_model: Callable[..., Any], *example_inputs: Any) -> int:
    """Count the floating-point operations of the contractions of one call.

    A multiply-add counts as two, so this is twice what much of the literature calls
    FLOPs. Matrix products (`dot_general`) and convolutions count and nothing else:
    no elementwise operation, no reduction, no `ragged_dot`, no factorization.
    Weights that are zero count like any other.

    Nothing is run and nothing is allocated. Padding counts as if it were image, as
    publications have it; the zeros that a transposed convolution puts between pixels
    do not. A scan counts as often as it runs, of the branches of a conditional the
    most expensive counts, and a `shard_map` counts on every device.

    Args:
      fn_or_model: any function that JAX can trace, or an NNX module, in the mode in
        which it is; one of `nnx.eval_shape` will do.
      *example_inputs: trees of arrays or `jax.ShapeDtypeStruct`, batch included.

    Returns:
      The number of operations.

    Raises:
      ValueError: where a shape is symbolic, or contractions are in a loop or kernel
        that does not say how often they run.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from sparsejax import analysis
      >>> analysis.flops(jnp.dot, jnp.ones((2, 8)), jnp.ones((8, 4)))
      128
      >>> model = nnx.eval_shape(lambda: nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
      >>> analysis.flops(model, jax.ShapeDtypeStruct((2, 8), jnp.float32))
      128
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(example_inputs):
        if any(map(jax.export.is_symbolic_dim, np.shape(leaf))):
            raise ValueError(
                "flops(...) needs a number for every dimension, got the shape "
                f"{np.shape(leaf)} for example_inputs{jax.tree_util.keystr(path)}; "
                "give an example of one size."
            )
    if isinstance(fn_or_model, nnx.Module):
        graphdef, state = nnx.split(fn_or_model)
        call: Any = lambda state, *inputs: nnx.merge(graphdef, state)(*inputs)
        return _count(jax.make_jaxpr(call)(state, *example_inputs).jaxpr)
    return _count(jax.make_jaxpr(fn_or_model)(*example_inputs).jaxpr)


def _count(jaxpr: Jaxpr) -> int:
    return sum(map(_count_equation, jaxpr.eqns))


def _count_equation(eqn: JaxprEqn) -> int:
    name = eqn.primitive.name
    if name == "dot_general":
        return 2 * _matrix_product(eqn)
    if name == "conv_general_dilated":
        return 2 * _convolution(eqn)
    held = [_count(jaxpr) for jaxpr in jaxprs_in_params(eqn.params)]
    if not any(held):
        return 0
    if name in CALLS:
        return sum(held)
    if name == "scan":
        return eqn.params["length"] * sum(held)
    if name == "cond":
        return max(held)
    if name == "shard_map":
        sizes, axes = eqn.params["mesh"].shape, eqn.params["newly_manual_axes"]
        return math.prod(sizes[axis] for axis in axes) * sum(held)
    raise ValueError(
        f"flops(...) must know how often contractions run, got {sum(held)} operations "
        f"inside the primitive {name!r}, which does not tell; write loops as "
        "`jax.lax.scan`, or as `jax.lax.fori_loop` with bounds that are numbers."
    )


def _shape(var: Any) -> tuple[int, ...]:
    return var.aval.shape


def _matrix_product(eqn: JaxprEqn) -> int:
    """Count multiply-adds: one for each output and contracted index."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = _shape(eqn.invars[0])
    return math.prod((*_shape(eqn.outvars[0]), *(shape[i] for i in contracted)))


def _convolution(eqn: JaxprEqn) -> int:
    """Count multiply-adds: one for each output, input of its group and tap.

    Along each spatial axis a tap meets either a pixel, real or padding, or one of the
    zeros that dilation of the input has put between pixels.
    """
    kernel, out = _shape(eqn.invars[1]), _shape(eqn.outvars[0])
    spec = eqn.params["dimension_numbers"]
    macs = out[spec.out_spec[0]] * out[spec.out_spec[1]] * kernel[spec.rhs_spec[1]]
    for out_axis, kernel_axis, strides, (before, _), spread, dilation in zip(
        spec.out_spec[2:],
        spec.rhs_spec[2:],
        eqn.params["window_strides"],
        eqn.params["padding"],
        eqn.params["lhs_dilation"],
        eqn.params["rhs_dilation"],
        strict=True,
    ):
        start = strides * np.arange(out[out_axis])[:, None] - before
        position = start + dilation * np.arange(kernel[kernel_axis])
        macs *= int(np.count_nonzero(position % spread == 0))
    return macs
