"""The file of a served model: arrays and metadata in the safetensors format.

It is a genuine safetensors file, which other tools read::

    8 bytes   length of the header, little-endian
    header    JSON: name -> {"dtype", "shape", "data_offsets"}, and "__metadata__",
              which maps strings to strings
    buffer    the arrays one after another, little-endian and row-major

Its last array, ``sha256``, is the SHA-256 digest of all bytes before it, header
included, so that an altered byte is found wherever it is. The format is specified at
https://github.com/huggingface/safetensors
"""

import hashlib
import json
import math
import os
import pathlib
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

FORMAT = "sparsejax.serving"
VERSION = "1"

_MOST_HEADER_BYTES = 100_000_000  # the limit of other readers too
_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class ServingError(ValueError):
    """A model cannot be exported, a file cannot be served, or inputs do not fit."""


class _Entry(NamedTuple):
    """An array as the header describes it; its bytes are counted from the buffer."""

    begin: int
    end: int
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]


def check_dtype(what: str, dtype: Any) -> None:
    """Raise ServingError unless arrays of the dtype can be written."""
    if dtype not in _DTYPE_NAMES:
        raise ServingError(
            f"{what} must have one of the dtypes {', '.join(map(str, _DTYPE_NAMES))}; "
            f"it has {dtype}."
        )


def check_target(path: pathlib.Path, overwrite: bool) -> None:
    """Raise OSError unless a file may be written at ``path``."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} must name a file, and is a directory.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} must be a directory; create it.")


def write(
    path: pathlib.Path,
    arrays: Mapping[str, Any],
    metadata: Mapping[str, str],
    *,
    overwrite: bool,
) -> None:
    """Write a file, whole or not at all.

    Args:
      path: where.
      arrays: arrays by name, of NumPy or JAX; one at a time is brought to the host.
      metadata: text by name.
      overwrite: whether a file that exists is replaced.

    Raises:
      OSError: as `check_target`, or the file cannot be written.
    """
    digest = hashlib.sha256()
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with unfinished.open("xb") as file:
            for chunk in _chunks(arrays, metadata):
                digest.update(chunk)
                file.write(chunk)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        check_target(path, overwrite)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _chunks(arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """Yield all bytes of the file but the digest."""
    header: dict[str, Any] = {
        "__metadata__": {"format": FORMAT, "version": VERSION, **metadata}
    }
    # Large items first: every array then begins at a multiple of its item size.
    names = sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)
    end = 0
    for name in names:
        begin, end = end, end + arrays[name].nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[arrays[name].dtype],
            "shape": arrays[name].shape,
            "data_offsets": [begin, end],
        }
    header["sha256"] = {"dtype": "U8", "shape": [32], "data_offsets": [end, end + 32]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield np.asarray(arrays[name]).tobytes()


def read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `write` wrote.

    Returns:
      The arrays by name, read-only, and the metadata, with format and version.

    Raises:
      ServingError: there is no such file, or it is another one, truncated, altered or
        of another version.
    """
    if not path.is_file():
        raise ServingError(f"{path} must be a file of {FORMAT}; there is none.")
    try:
        return _parse(path.read_bytes())
    except ServingError as error:
        raise ServingError(
            f"{path} must be a file of {FORMAT}: {error} Copy or export it again."
        ) from error.__cause__


def _parse(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    start = 8 + int.from_bytes(data[:8], "little")
    if start > min(len(data), _MOST_HEADER_BYTES):
        raise ServingError(
            f"it is another file or truncated, as {len(data)} bytes are too few or its "
            "header is too long."
        )
    entries, metadata = _parse_header(data[8:start])
    end = 0
    for entry in entries:
        size = math.prod(entry.shape) * entry.dtype.itemsize
        if entry.begin != end or entry.end != end + size:
            raise ServingError(
                f"{entry.name} {entry.dtype}{list(entry.shape)} must lie at bytes "
                f"{end} to {end + size}; its header has {entry.begin} to {entry.end}."
            )
        end = entry.end
    if len(data) != start + end:
        raise ServingError(
            f"it should have {start + end} bytes and has {len(data)}; it is truncated "
            "or was appended to."
        )
    digest = hashlib.sha256(memoryview(data)[:-32]).digest()
    if not entries or entries[-1].name != "sha256" or data[-32:] != digest:
        raise ServingError("it was altered, as its SHA-256 differs.")
    try:
        arrays = {
            name: np.ndarray(shape, dtype, buffer=data, offset=start + begin)
            for begin, _, name, dtype, shape in entries[:-1]
        }
    except ValueError as error:
        raise ServingError(f"a shape is beyond NumPy: {error}.") from error
    return arrays, metadata


def _parse_header(text: bytes) -> tuple[list[_Entry], dict[str, Any]]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ServingError("it is another file, or altered in its header.") from error
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ServingError("it is another file, as its metadata has another format.")
    if (version := metadata.get("version")) != VERSION:
        raise ServingError(
            f"its format version is {version}, and this sparsejax reads {VERSION}; "
            "load it with the sparsejax that wrote it."
        )
    return sorted(_entry(name, entry) for name, entry in header.items()), metadata


def _entry(name: str, entry: Any) -> _Entry:
    match entry:
        case {
            "dtype": str(dtype),
            "shape": [*shape],
            "data_offsets": [begin, end],
        } if dtype in _DTYPES and all(
            type(n) is int and n >= 0 for n in (*shape, begin, end)
        ):
            return _Entry(begin, end, name, _DTYPES[dtype], tuple(shape))
    raise ServingError(
        f"{name} must have a dtype of {', '.join(_DTYPES)}, a shape and two offsets; "
        f"its header has {entry}."
    )
