"""Back-end one: run the original function's equations on what is left of its inputs.

It needs nothing but the function. Sizes written into the program, as the denominator of
a mean or the scale of attention, stay what they were, so that it is exact. Functions
with custom derivatives are inlined: serve what comes out, do not train it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.compaction import rules
from sparsejax.compaction.axes import Axes, Axis
from sparsejax.compaction.coupling import Coupling
from sparsejax.compaction.liveness import Liveness
from sparsejax.compaction.plan import Selection, dropped, folded
from sparsejax.compaction.program import (
    Equation,
    Literal,
    Program,
    Value,
    literal_array,
    trace,
)
from sparsejax.compaction.subjects import Subject

Living = dict[str, tuple[np.ndarray | None, ...]]


class Rewriter:
    """Runs a program without the channels that a selection removes."""

    def __init__(
        self,
        selection: Selection,
        additions: Mapping[tuple[str, int], "Addition"],
    ):
        """Add to the outputs of contractions, named as in `Coupling.uses`."""
        self._selection = selection
        self._coupling: Coupling = selection.coupling
        self._additions = additions

    def axes(self, value: Value) -> Axes:
        """Return the axes of a value of the full program."""
        return self._coupling.of(value)

    def kept(self, axis: Axis) -> np.ndarray:
        """Return the indices of an axis that stay."""
        return self._selection.kept(axis)

    def shape(self, value: Value) -> tuple[Any, ...]:
        """Return the shape that is left of a value."""
        sizes = zip(value.shape, self.axes(value), strict=True)
        return tuple(n if axis is None else len(self.kept(axis)) for n, axis in sizes)

    def run(self, program: Program, inputs: list[Any]) -> list[Any]:
        """Run a program on what is left of its inputs."""
        environment = dict(zip(program.inputs, inputs, strict=True))
        for value, constant in program.constants.items():
            environment[value] = self._take(constant, self.axes(value))

        def read(value: Value) -> Any:
            if isinstance(value, Literal):
                return literal_array(value)
            return environment[value]

        for equation in program.equations:
            outputs = self._apply(equation, [read(value) for value in equation.inputs])
            environment.update(zip(equation.outputs, outputs, strict=True))
        return [read(value) for value in program.outputs]

    def _take(self, array: Any, axes: Axes) -> Any:
        for index, axis in enumerate(axes):
            if axis is not None and len(kept := self.kept(axis)) < len(axis):
                array = array.take(kept, axis=index)
        return array

    def _apply(self, equation: Equation, inputs: list[Any]) -> list[Any]:
        outputs = rules.rule_of(equation).rewrite(self, equation, inputs)
        addition = self._additions.get(self._coupling.uses.get(equation, ("", -1)))
        if addition is None:
            return outputs
        (output,) = outputs
        return [output + addition(self, equation).astype(output.dtype)]


@dataclasses.dataclass(frozen=True)
class Bias:
    """What constants add to every position of a contraction's output.

    Attributes:
      values: by kept output channel.
    """

    values: np.ndarray

    def __call__(self, rewriter: Rewriter, equation: Equation) -> jax.Array:
        """Return it in the shape of the output, fixed axes of size one."""
        axes = rewriter.axes(equation.outputs[0])
        shape = [1 if axis is None else len(rewriter.kept(axis)) for axis in axes]
        return jnp.asarray(self.values.reshape(shape))


@dataclasses.dataclass(frozen=True)
class BiasMap:
    """What constants add to a convolution's output: less where borders are padded.

    Attributes:
      values: [channels], zero where channels are kept.
      kernel: the convolution's, with all its channels.
    """

    values: np.ndarray
    kernel: np.ndarray

    def __call__(self, rewriter: Rewriter, equation: Equation) -> jax.Array:
        """Return it for images of the size that this trace has."""
        source, weight = equation.inputs
        numbers = equation.params["dimension_numbers"]
        shape = [1, self.values.size, *(source.shape[i] for i in numbers.lhs_spec[2:])]
        column = self.values.reshape(-1, *[1] * (len(shape) - 2))
        image = np.broadcast_to(column, shape).transpose(np.argsort(numbers.lhs_spec))
        kernel, out = self.kernel, numbers.rhs_spec[0]
        axis = rewriter.axes(weight)[out]
        if axis is not None:
            kernel = kernel.take(rewriter.kept(axis), axis=out)
        operands = jnp.asarray(image, source.dtype), jnp.asarray(kernel, weight.dtype)
        return equation.primitive.bind(*operands, **equation.params)


Addition = Bias | BiasMap


def additions(
    selection: Selection, liveness: Liveness, *, maps: bool
) -> dict[tuple[str, int], Addition]:
    """Return what contractions add to their outputs for constants they lose.

    Args:
      selection: the channels that go.
      liveness: holds the constants.
      maps: whether one that differs by position gets a `BiasMap`.
    """
    found: dict[tuple[str, int], Addition] = {}
    for constant in liveness.constants:
        gone = dropped(selection, constant)
        if gone.any():
            kernel = constant.equation.inputs[1]
            found[selection.coupling.uses[constant.equation]] = (
                BiasMap(np.where(gone, constant.values, 0), liveness.get(kernel).value)
                if maps and not constant.exact
                else Bias(folded(selection, constant))
            )
    return found


def replay(
    fn: Callable[..., Any],
    shapes: dict[str, jax.ShapeDtypeStruct],
    living: Living,
    added: Mapping[tuple[str, int], Addition],
) -> Callable[..., Any]:
    """Return ``small(arrays, *inputs)``: fn on what is left of its arrays.

    Args:
      fn: ``fn(arrays, *inputs)``, arrays by path.
      shapes: of the full arrays.
      living: for each axis of each array, `Selection.living`.
      added: what contractions add to their outputs.

    It is traced anew for every shape of its inputs, so that any size of batch, also a
    symbolic one, gets its own program.
    """

    @jax.jit
    def small(arrays: dict[str, jax.Array], *inputs: Any) -> Any:
        traced = trace(fn, shapes, *inputs)
        rewriter = Rewriter(transfer(Coupling(traced), living), added)
        leaves = jax.tree.leaves((arrays, inputs))
        return traced.output_tree.unflatten(rewriter.run(traced.program, leaves))

    return small


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["fn"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Replay:
    """A compacted function with its arrays; call it with the inputs.

    A pytree, as `sparsejax.serving.export` takes it.

    Attributes:
      arrays: what is left of the parameters, by path.
      fn: ``fn(arrays, *inputs)``.
    """

    arrays: dict[str, jax.Array]
    fn: Callable[..., Any]

    def __call__(self, *inputs: Any) -> Any:
        """Return the outputs."""
        return self.fn(self.arrays, *inputs)

    def subject(self) -> Subject:
        """Return it as a function of its arrays."""
        return Subject(
            self.fn, self.arrays, lambda arrays: Replay(dict(arrays), self.fn)
        )


def transfer(coupling: Coupling, living: Living) -> Selection:
    """Return the selection of another trace in which the same of every array lives.

    The equations of two traces of one function, as at two batch sizes, need not match;
    its parameters do.
    """
    resolved = coupling.resolved
    present, alive = (np.zeros(len(resolved.roots), bool) for _ in range(2))
    for path, axes in living.items():
        for axis, lives in zip(coupling.parameter_axes[path], axes, strict=True):
            if axis is not None and lives is not None:
                leaves = resolved.leaf_columns(axis.atoms)
                present[leaves[leaves >= 0]] = True
                alive[leaves[(leaves >= 0) & lives]] = True
    return Selection(coupling, present & ~alive)
