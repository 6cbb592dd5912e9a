"""Is the small model the masked one? Asked of its outputs and of its program."""

import difflib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.compaction.errors import CompactionError
from sparsejax.compaction.plan import Selection
from sparsejax.compaction.program import Literal, Program, literal_array, trace
from sparsejax.compaction.subjects import Subject

# Largest difference between two orders of summation, relative to the largest output.
_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}

# Primitives that shapes alone decide on.
_STRUCTURAL = {
    "broadcast_in_dim",
    "concatenate",
    "convert_element_type",
    "copy",
    "dynamic_slice",
    "expand_dims",
    "gather",
    "iota",
    "pad",
    "reshape",
    "slice",
    "split",
    "squeeze",
    "transpose",
}


def check(
    masked: Subject,
    small: Subject,
    example_inputs: tuple[Any, ...],
    selection: Selection,
    *,
    rebuilt: bool,
    inexact: bool,
) -> tuple[float, float]:
    """Compare outputs on random inputs; numbers in the programs explain a difference.

    Args:
      masked: the full model.
      small: what was made of it.
      example_inputs: of the masked model.
      selection: the channels that went.
      rebuilt: whether ``small`` runs code of its own.
      inexact: whether a difference was asked for.

    Returns:
      The largest absolute difference, and the largest absolute output.

    Raises:
      CompactionError: the small model cannot be called, or computes something else.
    """
    inputs = another_batch(masked, example_inputs)
    program = selection.coupling.traced.program
    hint = 'Pass backend="replay", or register_compact(Type, fix) for such a module.'
    try:
        again = trace(small.fn, small.arrays, *inputs).program
    except (TypeError, ValueError) as error:
        places = ", ".join(sizes_in_code(selection)[:5])
        raise CompactionError(
            "The model cannot be called with smaller parameters, it writes a size into "
            f"its own code: {error} Look at {places}.\n{hint}"
        ) from error
    error, scale = compare(masked, small, inputs)
    allowed = tolerance(program) * scale
    if error > allowed and not inexact:
        drifted = drift(program, again) if rebuilt else []
        found = "\n".join(drifted[:5]) or "no number in its program explains it"
        raise CompactionError(
            f"The compacted model differs from the masked one by {error:.3g} at "
            f"outputs up to {scale:.3g}; rounding explains {allowed:.3g}. {found}.\n"
            f"{hint}"
        )
    return error, scale


def another_batch(subject: Subject, example_inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return random inputs, of one more example than the given ones where it can be.

    Floats are standard normal, integers are drawn from the given ones.

    Args:
      subject: the function of these inputs.
      example_inputs: trees of arrays or ``jax.ShapeDtypeStruct``.
    """
    leaves = jax.tree.leaves(example_inputs)
    sizes = {leaf.shape[0] if leaf.shape else None for leaf in leaves}
    if len(sizes) == 1 and None not in sizes:
        larger = _drawn(example_inputs, 1)
        try:
            jax.eval_shape(subject.fn, subject.arrays, *larger)
            return larger
        except (TypeError, ValueError):  # its leading axis is no batch
            pass
    return _drawn(example_inputs, 0)


def _drawn(example_inputs: tuple[Any, ...], more: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> Any:
        shape = (leaf.shape[0] + more, *leaf.shape[1:]) if leaf.shape else ()
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.normal(size=shape), leaf.dtype)
        pool = np.zeros(1, leaf.dtype)
        if not isinstance(leaf, jax.ShapeDtypeStruct) and leaf.size:
            pool = np.ravel(leaf)
        return jnp.asarray(rng.choice(pool, size=shape), leaf.dtype)

    return jax.tree.map(draw, example_inputs)


def compare(
    masked: Subject, small: Subject, inputs: tuple[Any, ...]
) -> tuple[float, float]:
    """Return the largest absolute difference of outputs, and the largest output.

    Raises:
      CompactionError: the masked model's outputs are not finite.
    """
    with jax.default_matmul_precision("highest"):
        expected, found = (_outputs(subject, inputs) for subject in (masked, small))
    if not all(np.isfinite(leaf).all() for leaf in expected):
        raise CompactionError(
            "The masked model's outputs for random inputs are not finite. Compaction "
            "takes zero times any activation for zero: it needs finite activations."
        )
    differences = [
        np.abs(a - b).max(initial=0.0) for a, b in zip(expected, found, strict=True)
    ]
    scales = [np.abs(leaf).max(initial=0.0) for leaf in expected]
    return float(max(differences, default=0.0)), float(max(scales, default=0.0))


def _outputs(subject: Subject, inputs: tuple[Any, ...]) -> list[np.ndarray]:
    outputs = jax.jit(subject.fn)(subject.arrays, *inputs)
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(outputs)]


def tolerance(program: Program) -> float:
    """Return the largest relative difference that rounding explains in a program."""
    dtypes = {str(v.dtype) for equation in program.walk() for v in equation.outputs}
    return max([_TOLERANCE.get(name, 0.0) for name in dtypes], default=0.0)


def drift(full: Program, small: Program) -> list[str]:
    """Return where the small program computes with other numbers than the full one.

    A size that a module writes into its program, as the denominator of a mean,
    changes with the module. Primitives that only move entries are left out.
    """
    before, after = _scalars(full), _scalars(small)
    names = [[name for name, *_ in one] for one in (before, after)]
    found = []
    for a, b, n in difflib.SequenceMatcher(
        None, *names, autojunk=False
    ).get_matching_blocks():
        for (name, old, source), (_, new, _) in zip(
            before[a : a + n], after[b : b + n], strict=True
        ):
            if old != new:
                found.append(f"'{name}' ({source}) computes with {new}, not with {old}")
    return found


def _scalars(program: Program) -> list[tuple[str, list[float], str]]:
    return [
        (
            equation.name,
            [
                float(literal_array(value))
                for value in equation.inputs
                if isinstance(value, Literal) and value.dtype != bool
            ],
            equation.source,
        )
        for equation in program.walk()
        if equation.name not in _STRUCTURAL
    ]


def sizes_in_code(selection: Selection) -> list[str]:
    """Return the operations that may write a number of channels that has changed."""
    written = {"broadcast_in_dim", "iota", "pad", "reshape", "slice", "split"}
    found = [
        str(equation)
        for equation in selection.coupling.traced.program.walk()
        if equation.name in written
        for value in equation.outputs
        for axis in selection.coupling.of(value)
        if axis is not None and len(selection.kept(axis)) < len(axis)
    ]
    return list(dict.fromkeys(found))
