"""Export a model: what `sparsejax.serving.load` needs to run it anywhere, in a file."""

import importlib.metadata
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import numpy as np

from sparsejax.serving import _file
from sparsejax.serving._file import ServingError

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export(
    model: Any,
    path: str | os.PathLike[str],
    *inputs: Any,
    params: Any = None,
    batch: str | None = "b",
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    overwrite: bool = False,
) -> None:
    """Write a model to one file that runs without its code, on any batch size.

    The file holds the model lowered to StableHLO by `jax.export`, for all platforms
    at once, and the weights. It is one file, so that it is copied, named in a
    configuration and replaced under a running server in a single step, and in the
    safetensors format, so that other tools read the weights: they are called
    ``weights/`` and their path in the model. There is no pickle in it, and no path of
    this machine. It appears whole or not at all.

    Args:
      model: what is called with ``inputs``. An NNX module, in evaluation mode; or a
        tree with ``__call__``, as Equinox modules and `jax.tree_util.Partial` are; or,
        with ``params``, a function ``f(params, *inputs)``, as ``module.apply`` of
        Linen is. Arrays of numbers in the module, the tree or ``params`` are weights;
        all else, random keys included, becomes part of the program.
      path: the file; its folder must exist.
      *inputs: example inputs, arrays or `jax.ShapeDtypeStruct`, or dicts, lists and
        tuples of them. Only shapes and dtypes count.
      params: the parameters of a function; ``{}`` where it has none.
      batch: the letter for the first axis of all inputs, which may have any size of
        1 or more when served; ``None``: all sizes are those of the examples.
      platforms: what to lower for, of "cpu", "cuda", "rocm" and "tpu".
      overwrite: whether to replace a file at ``path``.

    Raises:
      ServingError: the call changes the module's state, as BatchNorm does in training;
        a weight has a dtype that cannot be written; the inputs have no first axis in
        common; a platform is unknown; ``batch`` is no name; `jax.export` knows no
        way to write the type of an input or output.
      TypeError: a function without ``params``, a module with them, or inputs that do
        not fit the model's signature.
      OSError: there is something at ``path``, or no folder for it.

    Example:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from sparsejax import serving
      >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "linear.safetensors")
      ...     serving.export(model, path, jnp.ones((1, 3)))
      ...     served = serving.load(path)
      >>> served
      ServedModel((inputs: float32[b, 3]) -> (output: float32[b, 2]), 8 parameters,
                  for cpu, cuda, tpu)
    """
    # Flax is imported here, not above, so that a server can do without.
    from sparsejax.serving import _lower

    path = pathlib.Path(path)
    _file.check_target(path, overwrite)
    unknown = [name for name in platforms if name not in _PLATFORMS]
    if unknown or not platforms or isinstance(platforms, str):
        raise ServingError(
            f"export(platforms=...) must be a sequence of {', '.join(_PLATFORMS)}; got "
            f"{platforms!r}."
        )
    if batch is not None and not batch.isidentifier():
        raise ServingError(f"export(batch=...) must be a name or None, got {batch!r}.")
    program, weights, signature = _lower.lower(
        model, inputs, params=params, batch=batch, platforms=platforms
    )
    metadata = {
        **signature.to_json(),
        "platforms": program.platforms,
        "num_parameters": sum(x.size for x in weights.values()),
        "parameter_bytes": sum(x.nbytes for x in weights.values()),
        "jax_version": jax.__version__,
        "sparsejax_version": _own_version(),
    }
    arrays = {
        **{f"weights/{name}": x for name, x in weights.items()},
        "program": np.frombuffer(_serialized(program), np.uint8),
    }
    _file.write(path, arrays, {"model": json.dumps(metadata)}, overwrite=overwrite)


def _serialized(program: jax.export.Exported) -> bytearray:
    try:
        return program.serialize()
    except ValueError as error:
        raise ServingError(
            "Inputs and outputs must be arrays in dicts, lists and tuples, or in types "
            f"that jax.export knows: {error}"
        ) from error


def _own_version() -> str:
    try:
        return importlib.metadata.version("sparsejax")
    except importlib.metadata.PackageNotFoundError:  # it runs from a checkout
        return "unknown"
