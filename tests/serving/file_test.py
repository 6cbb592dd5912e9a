import hashlib
import json
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import serving
from sparsejax.serving import _file

ARRAYS = {
    "f32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "bf16": np.arange(5).astype(jnp.bfloat16),
    "f16": np.array([[1.5], [-2.0]], np.float16),
    "bool": np.array([True, False, True]),
    "i8": np.array([-128, 127], np.int8),
    "u8": np.array([0, 255], np.uint8),
    "i16": np.array([-(2**15)], np.int16),
    "u16": np.array([2**16 - 1], np.uint16),
    "i32": np.array([-(2**31)], np.int32),
    "u32": np.array([2**32 - 1], np.uint32),
    "i64": np.array([-(2**63)], np.int64),
    "u64": np.array([2**64 - 1], np.uint64),
    "f64": np.array([np.pi]),
    "scalar": np.array(-0.0, np.float32),
    "empty": np.zeros((0, 7), np.float32),
    "empty bytes": np.zeros((0,), np.int8),
    "on device": jnp.ones((2, 2), jnp.bfloat16),
    "transposed": np.arange(6, dtype=np.int32).reshape(2, 3).T,
}


def packed(header, buffer=b""):
    """Return a file of our format, with the digest that belongs to it."""
    end = len(buffer)
    header = {
        "__metadata__": {"format": _file.FORMAT, "version": _file.VERSION},
        "sha256": {"dtype": "U8", "shape": [32], "data_offsets": [end, end + 32]},
        **header,
    }
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + buffer
    return data + hashlib.sha256(data).digest()


def entry(dtype, shape, *offsets):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "arrays.safetensors"


def test_arrays_and_metadata_come_back(path):
    _file.write(path, ARRAYS, {"note": "ä"}, overwrite=False)
    arrays, metadata = _file.read(path)
    assert metadata == {"format": _file.FORMAT, "version": "1", "note": "ä"}
    assert arrays.keys() == ARRAYS.keys()
    for name, wanted in ARRAYS.items():
        assert arrays[name].dtype == wanted.dtype
        assert arrays[name].shape == wanted.shape
        assert arrays[name].tobytes() == np.asarray(wanted).tobytes()
        assert not arrays[name].flags.writeable


def test_file_has_the_layout_of_safetensors(path):
    _file.write(path, ARRAYS, {"note": "text"}, overwrite=False)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 8 == 0
    header = json.loads(data[8:start])
    assert all(isinstance(x, str) for x in header.pop("__metadata__").values())
    ends = [0, *sorted(x["data_offsets"][1] for x in header.values())]
    assert sorted(x["data_offsets"][0] for x in header.values()) == ends[:-1]
    assert start + ends[-1] == len(data)
    for name, wanted in ARRAYS.items():
        begin, end = header[name]["data_offsets"]
        assert header[name]["shape"] == list(wanted.shape)
        assert data[start + begin : start + end] == np.asarray(wanted).tobytes()
        assert begin % wanted.dtype.itemsize == 0
    assert [header[name]["dtype"] for name in ("f32", "bf16", "f16", "bool", "u8")] == [
        "F32",
        "BF16",
        "F16",
        "BOOL",
        "U8",
    ]


def test_one_flipped_bit_in_any_byte_is_found(path):
    arrays = {"a": np.arange(9, dtype=np.float32), "b": np.ones(3, jnp.bfloat16)}
    _file.write(path, arrays, {"note": "text"}, overwrite=False)
    data = bytearray(path.read_bytes())
    for position in range(len(data)):
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        with pytest.raises(serving.ServingError):
            _file.read(path)
        data[position] ^= 1 << position % 8
    path.write_bytes(data)
    assert _file.read(path)[0].keys() == arrays.keys()


def test_a_file_cut_anywhere_is_found(path):
    _file.write(path, {"a": np.arange(9, dtype=np.float32)}, {}, overwrite=False)
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(serving.ServingError, match="truncated"):
            _file.read(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(serving.ServingError, match="appended to"):
        _file.read(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "another file or truncated"),
        (b"PK\x03\x04\0\0\0\0" + bytes(2**16), "another file"),
        ((2**63).to_bytes(8, "little") + bytes(100), "another file or truncated"),
        ((4).to_bytes(8, "little") + b"{..}", "altered in its header"),
        ((2).to_bytes(8, "little") + b"[]", "another format"),
        ((10**6).to_bytes(8, "little") + b"[" * 10**6, "altered in its header"),
        (packed({"__metadata__": {"format": "pt"}}), "another format"),
        (packed({"__metadata__": 3}), "another format"),
        (
            packed({"__metadata__": {"format": _file.FORMAT, "version": "2"}}),
            "format version is 2, and this sparsejax reads 1",
        ),
        (packed({"a": entry("F8", [1], 0, 1)}, b"1"), "a must have a dtype of"),
        (packed({"a": entry("U8", [-1], 0, 1)}, b"1"), "a must have a dtype of"),
        (packed({"a": entry("U8", [True], 0, 1)}, b"1"), "a must have a dtype of"),
        (packed({"a": entry("U8", [1.0], 0, 1)}, b"1"), "a must have a dtype of"),
        (packed({"a": entry("U8", [1], 0)}, b"1"), "a must have a dtype of"),
        (packed({"a": {"dtype": "U8"}}), "a must have a dtype of"),
        (packed({"a": None}), "a must have a dtype of"),
        (
            packed({"a": entry("U8", [1], 1, 0)}, b"1"),
            r"a uint8\[1\] must lie at .* 1;",
        ),
        (packed({"a": entry("F32", [2], 0, 4)}, b"1234"), "must lie at bytes 0 to 8"),
        (packed({"a": entry("U8", [1], 1, 2)}, b"12"), "must lie at bytes 0 to 1"),
        (packed({"a": entry("U8", [2], 1, 2)}, b"12"), "must lie at bytes 0 to 2"),
        (
            packed({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"123"),
            "b uint8.* must lie at bytes 2 to 4",
        ),
        (packed({"a": entry("U8", [2**62], 0, 2**62)}, b"1"), "must lie at bytes"),
        (packed({"sha256": entry("U8", [32], 0, 32)}, b"1"), "it is truncated or"),
        (packed({"a": entry("U8", [0, 2**62, 8], 0, 0)}), "beyond NumPy"),
        (packed({"a": entry("U8", [1] * 100, 0, 1)}, b"1"), "beyond NumPy"),
    ],
)
def test_bad_files(path, data, message):
    path.write_bytes(data)
    with pytest.raises(serving.ServingError, match=message) as caught:
        _file.read(path)
    assert str(path) in str(caught.value)


def test_a_file_without_digest_is_refused(path):
    header = json.dumps({"__metadata__": {"format": _file.FORMAT, "version": "1"}})
    data = len(header).to_bytes(8, "little") + header.encode()
    path.write_bytes(data)
    with pytest.raises(serving.ServingError, match="SHA-256 differs"):
        _file.read(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(serving.ServingError, match="there is none"):
            _file.read(path)


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_failure_while_writing_leaves_what_was(path, monkeypatch, exists, after):
    old, new = {"a": np.zeros(3)}, {"a": np.ones(5), "b": np.ones(2)}
    if exists:
        _file.write(path, old, {}, overwrite=False)
    chunks = _file._chunks

    def failing(arrays, metadata):
        for number, chunk in enumerate(chunks(arrays, metadata)):
            if number == after:
                raise OSError("No space left on device")
            yield chunk

    monkeypatch.setattr(_file, "_chunks", failing)
    with pytest.raises(OSError, match="No space"):
        _file.write(path, new, {}, overwrite=True)
    assert os.listdir(path.parent) == [path.name] * exists
    if exists:
        np.testing.assert_array_equal(_file.read(path)[0]["a"], old["a"])


def test_a_file_that_came_meanwhile_is_not_replaced(path, monkeypatch):
    chunks = _file._chunks

    def slow(arrays, metadata):
        yield from chunks(arrays, metadata)
        path.write_text("theirs")

    monkeypatch.setattr(_file, "_chunks", slow)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        _file.write(path, {}, {}, overwrite=False)
    assert path.read_text() == "theirs"
    assert os.listdir(path.parent) == [path.name]


def test_targets_that_are_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        _file.check_target(file, False)
    _file.check_target(file, True)
    with pytest.raises(IsADirectoryError):
        _file.check_target(tmp_path, True)
    with pytest.raises(FileNotFoundError, match="missing must be a directory"):
        _file.check_target(pathlib.Path(tmp_path, "missing", "file"), False)
