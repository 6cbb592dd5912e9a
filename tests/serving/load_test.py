"""What is refused: files whose parts do not fit, processes, inputs."""

import json
import pathlib
import pkgutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax
from sparsejax import serving
from sparsejax.serving import _file

ROOT = pathlib.Path(sparsejax.__file__).parents[1]
PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.zeros((1, 3), jnp.bfloat16)}


def model(params, x, masks):
    return x @ params["w"] + params["b"] * masks["keep"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("load") / "model.safetensors"
    masks = {"keep": jnp.ones((2, 3), bool)}
    serving.export(model, path, jnp.ones((2, 4)), masks, params=PARAMS)
    return path


@pytest.fixture(scope="module")
def served(file):
    return serving.load(file)


def inputs(size=2, *, x=None, keep=None):
    x = np.ones((size, 4), np.float32) if x is None else x
    return x, {"keep": np.ones((size, 3), bool) if keep is None else keep}


def test_any_batch_size_and_kind_of_array(served):
    for size in (1, 5):
        assert served(*inputs(size)).tolist() == [[4.0] * 3] * size
    x, masks = jax.tree.map(jnp.asarray, inputs(5))
    assert served(x, masks).tolist() == [[4.0] * 3] * 5
    assert served(*inputs(5, x=np.ones((5, 4)))).dtype == np.float32
    assert jax.jit(served)(x, masks).tolist() == [[4.0] * 3] * 5


def test_weights_are_put_on_the_device_once(served):
    with jax.transfer_guard("disallow"):
        served(*jax.device_put(inputs(5)))
    assert all(isinstance(x, jax.Array) for x in served._weights.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (inputs(x=np.ones((2, 5), np.float32)), r"takes x: float32\[b, 4\].*\[2, 5\]"),
        (inputs(x=np.ones(4, np.float32)), r"takes x: float32\[b, 4\].* float32\[4\]"),
        (
            inputs(x=np.ones((2, 4), np.uint8)),
            r"takes x: float32.*; got x: uint8\[2, 4",
        ),
        (inputs(0), r"takes x: float32\[b, 4\]; got x: float32\[0, 4\]"),
        (
            inputs(2, keep=np.ones((3, 3), bool)),
            r"takes masks/keep: bool\[b, 3\], b = 2; got masks/keep: bool\[3, 3\]",
        ),
        (inputs(x=3.0), r"x: float32\[b, 4\] must be an array, got float"),
        (inputs(x=jax.random.key(0)), "x: .* must be an array, got PRNGKeyArray"),
        (inputs()[:1], r"takes \(x: float32\[b, 4\], masks/keep.* got PyTreeDef"),
        (
            (inputs()[0], inputs()[0]),
            r"takes .* as PyTreeDef\(\(\*, \{'keep': \*\}\)\)",
        ),
        (inputs(x=[1.0, 2.0]), r"got PyTreeDef\(\(\[\*, \*\], "),
    ],
)
def test_inputs_that_do_not_fit(served, arguments, message):
    with pytest.raises(serving.ServingError, match=message):
        served(*arguments)


def rewritten(file, path, change):
    """Write the file with a change, and the checksum that belongs to it."""
    arrays, metadata = _file.read(file)
    described = json.loads(metadata.pop("model"))
    change(arrays, described)
    for name in ("format", "version"):
        del metadata[name]
    _file.write(path, arrays, {"model": json.dumps(described)}, overwrite=False)
    return path


def shorten_program(arrays, described):
    arrays["program"] = arrays["program"][: arrays["program"].size // 2]


def replace_program(arrays, described):
    arrays["program"] = np.frombuffer(b"hello" * 50, np.uint8)


def damage_stablehlo(arrays, described):
    program = bytearray(arrays["program"])
    at = program.index(b"StableHLO")
    program[at + 40 : at + 400] = bytes(360)
    arrays["program"] = np.frombuffer(program, np.uint8)


def remove_program(arrays, described):
    del arrays["program"]


def remove_weight(arrays, described):
    del arrays["weights/w"]


def add_weight(arrays, described):
    arrays["weights/c"] = np.ones(1)


def reshape_weight(arrays, described):
    arrays["weights/w"] = arrays["weights/w"].T


def cast_weight(arrays, described):
    arrays["weights/b"] = arrays["weights/b"].astype(np.float16)


def change_signature(arrays, described):
    described["inputs"][0]["shape"][1] = 5


def shorten_signature(arrays, described):
    described["outputs"].clear()


def remove_signature(arrays, described):
    del described["inputs"]


@pytest.mark.parametrize(
    "change",
    [
        shorten_program,
        replace_program,
        damage_stablehlo,
        remove_program,
        remove_weight,
        add_weight,
        reshape_weight,
        cast_weight,
        change_signature,
        shorten_signature,
        remove_signature,
    ],
)
def test_parts_that_do_not_fit(file, tmp_path, change):
    path = rewritten(file, tmp_path / "model", change)
    with pytest.raises(serving.ServingError, match="must hold a program"):
        serving.load(path)


def test_a_file_without_a_model(tmp_path):
    path = tmp_path / "model"
    _file.write(path, {"weights/w": np.ones(3)}, {}, overwrite=False)
    with pytest.raises(serving.ServingError, match="must hold a program"):
        serving.load(path)


def test_an_unchanged_file_loads(file, tmp_path):
    path = rewritten(file, tmp_path / "model", lambda arrays, described: None)
    assert serving.load(path).signature == serving.load(file).signature


def test_truncated_and_altered(file, tmp_path):
    data = file.read_bytes()
    path = tmp_path / "model"
    for size in np.linspace(0, len(data) - 1, 50, dtype=int):
        path.write_bytes(data[:size])
        with pytest.raises(serving.ServingError, match="truncated"):
            serving.load(path)
    for position in np.linspace(0, len(data) - 1, 500, dtype=int):
        flipped = bytearray(data)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(serving.ServingError):
            serving.load(path)


def test_a_program_for_another_platform(tmp_path):
    path = tmp_path / "model"
    double = lambda params, x: 2 * x
    serving.export(double, path, jnp.ones((1, 2)), params={}, platforms=("tpu",))
    with pytest.raises(
        serving.ServingError,
        match=r"exported for tpu, and this process runs on cpu; .* 'cpu' in platforms=",
    ):
        serving.load(path)


def test_a_program_in_64_bits(tmp_path):
    path = tmp_path / "model"
    with jax.enable_x64(True):
        params = jnp.full((1, 2), np.pi, jnp.float64)
        add = lambda params, x: params + x
        serving.export(add, path, np.zeros((1, 2)), params=params)
        result = serving.load(path)(np.zeros((3, 2)))
        assert result.dtype == np.float64
        assert result.tolist() == [[np.pi] * 2] * 3
    with pytest.raises(serving.ServingError, match="float64; set jax_enable_x64"):
        serving.load(path)


def test_every_public_module_is_listed():
    found = [module.name for module in pkgutil.iter_modules(sparsejax.__path__)]
    assert sparsejax.__all__ == [name for name in found if not name.startswith("_")]


def test_subpackages_are_imported_at_first_use():
    source = """
import sys, sparsejax
assert not any(name.startswith("sparsejax.") for name in sys.modules)
assert set(sparsejax.__all__) <= set(dir(sparsejax))
assert sparsejax.masks is sys.modules["sparsejax.masks"]
assert "sparsejax.sparse_optax" not in sys.modules
from sparsejax import *
assert all(f"sparsejax.{name}" in sys.modules for name in sparsejax.__all__)
"""
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="'sparsejax' has no attribute 'mask'"):
        sparsejax.mask  # noqa: B018
