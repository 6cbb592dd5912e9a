"""Load an exported model and call it; needs JAX and NumPy only."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.export
import numpy as np

from sparsejax.serving import _file
from sparsejax.serving._file import ServingError
from sparsejax.serving._signature import Signature, check_inputs, describe


class ServedModel:
    """An exported model, with its weights on the default device: call it with arrays.

    It returns what the exported model returned. The first call at a new batch size
    compiles, as in `jax.jit`.

    Attributes:
      signature: names, shapes and dtypes of the leaves of inputs and outputs.
      metadata: all that the file says of the model.
      platforms: what it was lowered for.
      num_parameters: how many numbers the weights hold, statistics of BatchNorm
        included.
    """

    signature: Signature
    metadata: dict[str, Any]
    platforms: tuple[str, ...]
    num_parameters: int

    def __init__(
        self,
        exported: jax.export.Exported,
        weights: Mapping[str, np.ndarray],
        metadata: Mapping[str, Any],
    ):
        self.signature = Signature.from_json(metadata)
        self.metadata = dict(metadata)
        self.platforms = exported.platforms
        self.num_parameters = sum(array.size for array in weights.values())
        self._structure = exported.in_tree.children()[0].children()[1]
        self._weights = jax.device_put(dict(weights))
        self._run = jax.jit(exported.call)

    def __call__(self, *inputs: Any) -> Any:
        """Return the model's outputs.

        Args:
          *inputs: trees of arrays like those of the export; a size that the signature
            gives as a letter may be any.

        Raises:
          ServingError: the inputs are not what the signature says.
        """
        structure = jax.tree.structure(inputs)
        if structure != self._structure:
            raise ServingError(
                f"The model takes {self.signature}, as {self._structure}; got "
                f"{structure}."
            )
        check_inputs(self.signature.inputs, jax.tree.leaves(inputs))
        return self._run(self._weights, inputs)

    def __repr__(self) -> str:
        return (
            f"ServedModel({self.signature}, {self.num_parameters} parameters, "
            f"for {', '.join(self.platforms)})"
        )


def load(path: str | os.PathLike[str]) -> ServedModel:
    """Load a model that `sparsejax.serving.export` wrote.

    Everything is checked before anything runs: the file byte for byte against its
    checksum, and its weights against the arguments of its program. A checksum finds
    damage and not intent: load files of people you trust, as a program may call
    whatever the installed JAX can.

    Args:
      path: the file.

    Returns:
      A function of arrays.

    Raises:
      ServingError: there is no such file; it is another one, truncated, altered or of
        another version; it was not exported for the platform of this process, or
        needs ``jax_enable_x64``.

    Example:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> from sparsejax import serving
      >>> double = lambda params, x: params["two"] * x
      >>> params = {"two": jnp.full((1, 3), 2.0)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "double.safetensors")
      ...     serving.export(double, path, jnp.ones((1, 3)), params=params)
      ...     served = serving.load(path)
      >>> print(served.signature)
      (x: float32[b, 3]) -> (output: float32[b, 3])
      >>> served(jnp.ones((5, 3))).shape
      (5, 3)
    """
    path = pathlib.Path(path)
    arrays, metadata = _file.read(path)
    try:
        metadata |= json.loads(metadata.pop("model"))
        exported = jax.export.deserialize(bytearray(arrays.pop("program").tobytes()))
        weights = {
            name.removeprefix("weights/"): arrays[name] for name in sorted(arrays)
        }
        _check_program(exported, weights, Signature.from_json(metadata))
    except Exception as error:  # a parser of wrong bytes may raise anything
        raise ServingError(
            f"{path} must hold a program that jax {jax.__version__} can read, and its "
            f"weights: {error} Export it again."
        ) from error
    _check_process(path, exported)
    return ServedModel(exported, weights, metadata)


def _check_program(
    exported: jax.export.Exported,
    weights: Mapping[str, np.ndarray],
    stated: Signature,
) -> None:
    """Raise unless the program takes the weights and has the stated signature."""
    exported.mlir_module()  # parses it, which JAX itself puts off to the first call
    (wanted, inputs), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    if describe(wanted, wanted.values()) != describe(weights, weights.values()):
        raise ServingError("its program takes other weights than it holds.")
    input_names, output_names = ([spec.name for spec in side] for side in stated)
    own = Signature(
        describe(input_names, jax.tree.leaves(inputs)),
        describe(output_names, exported.out_avals),
    )
    if own != stated:
        raise ServingError(f"its program is {own}, and its header says {stated}.")


def _check_process(path: pathlib.Path, exported: jax.export.Exported) -> None:
    """Raise ServingError unless this process can run the program."""
    platform = jax.export.default_export_platform()
    if platform not in exported.platforms:
        raise ServingError(
            f"{path} was exported for {', '.join(exported.platforms)}, and this "
            f"process runs on {platform}; export it with {platform!r} in platforms=."
        )
    for aval in exported.in_avals:
        if jax.dtypes.canonicalize_dtype(aval.dtype) != aval.dtype:
            raise ServingError(
                f"{path} computes with {aval.dtype}; set jax_enable_x64 before loading."
            )
