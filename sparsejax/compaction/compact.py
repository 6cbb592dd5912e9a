"""The public functions: groups of channels, and models without the dead ones."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.compaction.analysis import Analysis, analyse, refuse
from sparsejax.compaction.coupling import Coupling
from sparsejax.compaction.groups import find_groups
from sparsejax.compaction.layers import equal_sizes
from sparsejax.compaction.optimizer import slice_optimizer_state
from sparsejax.compaction.plan import Plan, make_plan
from sparsejax.compaction.program import Traced, trace
from sparsejax.compaction.rebuild import foldable, rebuild
from sparsejax.compaction.replay import Replay, additions, replay
from sparsejax.compaction.report import Report, make_report
from sparsejax.compaction.slicing import take
from sparsejax.compaction.subjects import (
    Subject,
    check_unchanged,
    of_model,
    of_tree,
)
from sparsejax.compaction.verify import check

_CHOICES = {
    "constants": ("exact", "interior", "map", "keep"),
    "on_unknown": ("error", "pin"),
    "backend": ("rebuild", "replay"),
}


def channel_groups(model: Any, *example_inputs: Any, params: Any = None) -> Report:
    """Find the channels of a model that live and die together.

    Args:
      model: an ``nnx.Module`` in evaluation mode or another callable pytree; its
        arrays may be ``jax.ShapeDtypeStruct``. With ``params``, a function.
      *example_inputs: what the model is called with, arrays or
        ``jax.ShapeDtypeStruct``.
      params: tree of arrays; the model is ``model(params, *example_inputs)``.

    Returns:
      A `Report` whose ``groups`` are plain data: for each group of channels the
      parameters, axes and indices that belong to it, producers, norms, statistics and
      consumers told apart, and what pins it. ``report.zero`` masks whole channels.

    Raises:
      CompactionError: the model is in training mode.
      TypeError: the model cannot be called.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from sparsejax import compaction
      >>> model = nnx.Sequential(
      ...     nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu,
      ...     nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
      >>> report = compaction.channel_groups(model, jnp.ones((1, 4)))
      >>> group = report["layers/0"]
      >>> [(member.path, member.axis, member.role) for member in group.members]
      [('layers/0/kernel', 1, 'producer'), ('layers/0/bias', 0, 'norm'),
       ('layers/2/kernel', 0, 'consumer')]
    """
    check_unchanged(model, example_inputs)
    start = time.perf_counter()
    subject = of_model(model) if params is None else of_tree(model, params)
    grouping = find_groups(Coupling(trace(subject.fn, subject.arrays, *example_inputs)))
    count = sum(math.prod(array.shape) for array in subject.arrays.values())
    return Report(
        groups=grouping.groups,
        removed={},
        kept={},
        plan=None,
        parameters=(count, count),
        seconds=time.perf_counter() - start,
        read=_reader(model if params is None else None),
    )


def compact(
    model: Any,
    *example_inputs: Any,
    constants: str = "exact",
    on_unknown: str = "error",
    backend: str = "rebuild",
    round_to: int = 1,
    verify: bool = True,
    opt_state: Any = None,
) -> Any:
    """Return a smaller model that computes what the masked model computes.

    Channels that the weights leave dead are removed from all parameters they touch.
    The dependence between channels is read from the model's jaxpr, and dead ones from
    the weights, so that no mask is needed. Activations must be finite.

    Args:
      model: an ``nnx.Module`` in evaluation mode or another callable pytree (for which
        ``backend="rebuild"`` slices arrays and leaves static fields as they are).
      *example_inputs: what the model is called with, arrays or
        ``jax.ShapeDtypeStruct``.
      constants: what becomes of channels that are dead but for a constant, as a norm's
        shift leaves it. "exact": what receives them takes up the constant in its bias
        where that is exact; others stay and are reported. "interior": a constant is
        taken up although zero padding makes borders differ; ``report.max_error`` tells
        by how much. "map": padded ones as a bias map, exact (``backend="replay"``).
        "keep": they stay.
      on_unknown: "error", or "pin" to keep masked channels that an operation cannot do
        without.
      backend: "rebuild" for modules of the same classes, to train or serve; "replay"
        for a `Replay` that runs the original function's equations, whatever they are.
      round_to: kept channels become a multiple of this where dead ones allow it.
      verify: whether to compare the outputs on random inputs.
      opt_state: an optimizer state of the full model, to be sliced along.

    Returns:
      The small model and its `Report`; with ``opt_state``, the small model, its
      optimizer state and the report.

    Raises:
      CompactionError: a masked channel cannot be removed (it names the parameter, the
        axis, the primitive and the source line), the model is in training mode, or the
        smaller module computes something else.
      ValueError: an option is none of those above.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from sparsejax import compaction
      >>> model = nnx.Sequential(
      ...     nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu,
      ...     nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
      >>> report = compaction.channel_groups(model, jnp.ones((1, 4)))
      >>> masked = report.zero(model, {"layers/0": [0, 2, 5]})
      >>> small, report = compaction.compact(masked, jnp.ones((1, 4)))
      >>> small.layers[0].kernel.shape, small.layers[2].in_features
      ((4, 5), 5)
    """
    _check(constants=constants, on_unknown=on_unknown, backend=backend)
    _check_round(round_to)
    rebuilds = backend == "rebuild"
    if rebuilds and constants == "map":
        raise ValueError(
            'compact(constants="map") needs backend="replay": no layer has a bias by '
            "position."
        )
    check_unchanged(model, example_inputs)
    subject = of_model(model)
    is_module = isinstance(model, nnx.Module)
    done = _analysed(
        subject,
        example_inputs,
        constants=constants,
        on_unknown=on_unknown,
        round_to=round_to,
        rebuild=rebuilds,
        foldable=foldable(model) if is_module else (lambda path: not rebuilds),
        equal=equal_sizes(model) if is_module and rebuilds else (),
        read=_reader(model),
    )
    if not rebuilds:
        small = _replayed(subject, done, constants)
    elif is_module:
        small = rebuild(model, done.plan)
    else:
        small = subject.assemble(_sliced(subject, done.plan))
    report = done.report
    if verify:
        report = _verified(subject, small, example_inputs, done, constants)
    if opt_state is None:
        return small, report
    return small, slice_optimizer_state(opt_state, model, done.plan), report


def compact_fn(
    fn: Callable[..., Any],
    params: Any,
    *example_inputs: Any,
    constants: str = "exact",
    on_unknown: str = "error",
    round_to: int = 1,
    verify: bool = True,
) -> tuple[Callable[..., Any], Any, Report]:
    """Return a smaller function that computes what ``fn(params, *inputs)`` computes.

    It runs the original function's equations on smaller arrays, for inputs of any
    shape that ``fn`` takes, symbolic ones included. Functions with custom derivatives
    are inlined: it is made to serve, not to train.

    Args:
      fn: a JAX function.
      params: tree of arrays, masked; leaves that are no arrays are left as they are.
      *example_inputs: as for `compact`.
      constants: as for `compact`.
      on_unknown: as for `compact`.
      round_to: as for `compact`.
      verify: as for `compact`.

    Returns:
      ``small_fn``, ``small_params`` and the `Report`: ``small_fn(small_params,
      *inputs)`` is the result.

    Raises:
      CompactionError: as for `compact`.
      ValueError: as for `compact`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import compaction
      >>> params = {"a": jnp.ones((3, 4)).at[:, 1].set(0), "b": jnp.ones((4, 2))}
      >>> fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
      >>> small_fn, small, _ = compaction.compact_fn(fn, params, jnp.ones((1, 3)))
      >>> small["a"].shape, small["b"].shape, small_fn(small, jnp.ones((5, 3))).shape
      ((3, 3), (3, 2), (5, 2))
    """
    _check(constants=constants, on_unknown=on_unknown)
    _check_round(round_to)
    subject = of_tree(fn, params)
    done = _analysed(
        subject,
        example_inputs,
        constants=constants,
        on_unknown=on_unknown,
        round_to=round_to,
        read=_reader(None),
    )
    replayed = _replayed(subject, done, constants)
    small_params = subject.assemble(replayed.arrays)

    def small_fn(params: Any, *inputs: Any) -> Any:
        return replayed.fn(of_tree(fn, params).arrays, *inputs)

    report = done.report
    if verify:
        report = _verified(subject, replayed, example_inputs, done, constants)
    return small_fn, small_params, report


class _Done(NamedTuple):
    """What analysis gives all back-ends."""

    traced: Traced
    analysis: Analysis
    plan: Plan
    report: Report


def _analysed(
    subject: Subject,
    example_inputs: tuple[Any, ...],
    *,
    on_unknown: str,
    read: Callable[[Any], Subject],
    **options: Any,
) -> _Done:
    start = time.perf_counter()
    traced = trace(subject.fn, subject.arrays, *example_inputs)
    analysis = analyse(traced, subject.arrays, **options)
    if on_unknown == "error":
        refuse(analysis)
    plan = make_plan(analysis.selection, analysis.liveness.constants)
    sizes = [
        (math.prod(array.shape), _size_left(plan, path, array))
        for path, array in subject.arrays.items()
    ]
    before, after = (sum(column) for column in zip(*sizes, strict=True))
    report = make_report(
        analysis,
        plan=plan,
        parameters=(before, after),
        seconds=time.perf_counter() - start,
        read=read,
    )
    return _Done(traced, analysis, plan, report)


def _size_left(plan: Plan, path: str, array: Any) -> int:
    kept = zip(array.shape, plan.keep[path], strict=True)
    return math.prod(n if one is None else len(one) for n, one in kept)


def _sliced(subject: Subject, plan: Plan) -> dict[str, Any]:
    return {
        path: take(array, plan.keep[path]) for path, array in subject.arrays.items()
    }


def _replayed(subject: Subject, done: _Done, constants: str) -> Replay:
    selection, liveness = done.analysis.selection, done.analysis.liveness
    added = additions(selection, liveness, maps=constants == "map")
    shapes = {
        path: jax.ShapeDtypeStruct(array.shape, array.dtype)
        for path, array in subject.arrays.items()
    }
    living = {
        path: selection.living(axes)
        for path, axes in selection.coupling.parameter_axes.items()
        if path in shapes
    }
    left = jax.tree.map(jnp.asarray, _sliced(subject, done.plan))
    return Replay(left, replay(subject.fn, shapes, living, added))


def _verified(
    subject: Subject, small: Any, inputs: tuple[Any, ...], done: _Done, constants: str
) -> Report:
    """Return the report with the measured error; raise where it is too large."""
    own = small.subject() if isinstance(small, Replay) else of_model(small)
    error, scale = check(
        subject,
        own,
        inputs,
        done.analysis.selection,
        rebuilt=not isinstance(small, Replay),
        inexact=constants == "interior",
    )
    return dataclasses.replace(done.report, max_error=error, scale=scale)


def _reader(model: Any) -> Callable[[Any], Subject]:
    """Return what reads another model, or tree of parameters, of the same kind."""
    return (
        of_model if model is not None else functools.partial(of_tree, lambda *_: None)
    )


def _check(**given: str) -> None:
    for name, value in given.items():
        if value not in _CHOICES[name]:
            options = ", ".join(map(repr, _CHOICES[name]))
            raise ValueError(f"{name} must be one of {options}, got {value!r}.")


def _check_round(round_to: int) -> None:
    if not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"round_to must be an integer of 1 or more, got {round_to!r}.")
