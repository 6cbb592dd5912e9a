"""Lower a model to a program and its weights. Imports Flax; loading does not."""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from flax import nnx

from sparsejax.compaction.errors import CompactionError
from sparsejax.compaction.subjects import check_unchanged, of_model, of_tree
from sparsejax.masks.layout import named_leaves, path_name
from sparsejax.serving._file import ServingError, check_dtype
from sparsejax.serving._signature import Signature, describe, is_array


class Lowered(NamedTuple):
    """A program of weights by path and a tuple of inputs, and those weights."""

    program: jax.export.Exported
    weights: dict[str, jax.Array]
    signature: Signature


def lower(
    model: Any,
    inputs: tuple[Any, ...],
    *,
    params: Any,
    batch: str | None,
    platforms: Sequence[str],
) -> Lowered:
    """Lower what `sparsejax.serving.export` takes, with that function's arguments."""
    _check_model(model, params)
    names = _input_names(model, inputs, params)
    specs = _input_specs(names, inputs, batch)
    with _explained(batch), _file_names_without_folders():
        _check_unchanged(model, specs)
        subject = of_model(model) if params is None else of_tree(model, params)
        weights = {path: jnp.asarray(x) for path, x in subject.arrays.items()}
        for path, array in weights.items():
            check_dtype(path, array.dtype)
        weight_specs = {
            path: jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type)
            for path, x in weights.items()
        }

        def program(weights, inputs):
            return subject.fn(weights, *inputs)

        lowering = jax.export.export(jax.jit(program), platforms=platforms)
        exported = lowering(weight_specs, specs)
    outputs = named_leaves({"output": exported.out_tree.unflatten(exported.out_avals)})
    signature = Signature(
        describe(names, jax.tree.leaves(specs)), describe(outputs, outputs.values())
    )
    return Lowered(exported, weights, signature)


def _check_model(model: Any, params: Any) -> None:
    if isinstance(model, nnx.Module):
        if params is not None:
            raise TypeError(
                "export(params=...) is for a function; a module has its own."
            )
    elif params is None and jax.tree_util.all_leaves([model]):
        raise TypeError(
            f"export needs a module, a tree that can be called, or a function with "
            f"params=... ({{}} where it has none); got {model!r} without."
        )


def _input_names(model: Any, inputs: tuple[Any, ...], params: Any) -> list[str]:
    """Name the leaves of the inputs after the arguments that they are."""
    function = model if params is None else functools.partial(model, params)
    arguments = inspect.signature(function).bind(*inputs).arguments
    return [
        "/".join([name, *filter(None, [path_name(path)])])
        for name, argument in arguments.items()
        for path, _ in jax.tree_util.tree_leaves_with_path(argument)
    ]


def _input_specs(
    names: Sequence[str], inputs: tuple[Any, ...], batch: str | None
) -> tuple[Any, ...]:
    """Return the inputs as shapes and dtypes, the first axis being ``batch``."""
    leaves, structure = jax.tree.flatten(inputs)
    for name, x in zip(names, leaves, strict=True):
        if not (is_array(x) or isinstance(x, jax.ShapeDtypeStruct)):
            raise ServingError(
                f"The example input {name} must be an array of numbers, got {x!r}."
            )
    shapes = [x.shape for x in leaves]
    if batch is not None:
        if len({shape[:1] for shape in shapes}) > 1 or () in shapes:
            given = ", ".join(map(str, describe(names, leaves)))
            raise ServingError(
                f"With batch={batch!r} all example inputs must have one first axis in "
                f"common, got {given}; pass batch=None to fix their shapes."
            )
        (size,) = jax.export.symbolic_shape(batch)
        shapes = [(size, *shape[1:]) for shape in shapes]
    dtypes = [jax.dtypes.canonicalize_dtype(x.dtype) for x in leaves]
    return structure.unflatten(map(jax.ShapeDtypeStruct, shapes, dtypes))


def _check_unchanged(model: Any, specs: tuple[Any, ...]) -> None:
    try:
        check_unchanged(model, specs)
    except CompactionError as error:
        raise ServingError(str(error)) from error


@contextlib.contextmanager
def _explained(batch: str | None) -> Iterator[None]:
    """Add to an error of the model's own code that the batch has no size."""
    try:
        yield
    except ServingError:
        raise
    except Exception as error:
        if batch is not None:
            error.add_note(
                f"export(batch={batch!r}) traces the model for every batch size at "
                "once; batch=None takes the sizes of the example inputs."
            )
        raise


@contextlib.contextmanager
def _file_names_without_folders() -> Iterator[None]:
    """Keep the folders of this machine out of the source lines in a program."""
    option = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, option)
    jax.config.update(option, r".*[/\\]")
    try:
        yield
    finally:
        jax.config.update(option, before)
