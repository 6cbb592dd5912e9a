"""What is written, and what is refused."""

import importlib.metadata
import json
import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparsejax
from sparsejax import serving
from sparsejax.serving import _file

ROOT = pathlib.Path(sparsejax.__file__).parents[1]
ROWS = jnp.zeros((2, 4))


class Regularised(nnx.Module):
    """A linear layer whose BatchNorm and dropout change state in training."""

    def __init__(self, wrap=lambda f: f, *, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.wrap = wrap

    def __call__(self, x):
        layers = lambda self, x: self.drop(self.norm(self.linear(x)))
        return self.wrap(layers)(self, x)


def exported(path, model, *inputs, **arguments):
    serving.export(model, path, *inputs, **arguments)
    return serving.load(path)


def weights_of(path):
    arrays, _ = _file.read(path)
    return {
        name.removeprefix("weights/"): x
        for name, x in arrays.items()
        if name.startswith("weights/")
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def test_metadata_platforms_and_signature(path):
    def model(params, images, extra):
        return {"logits": images @ params["w"], "sum": extra["mask"].sum()}

    params = {"w": jnp.ones((4, 3), jnp.bfloat16), "step": jnp.zeros((), jnp.int32)}
    served = exported(
        path, model, ROWS, {"mask": np.ones((2, 5), bool)}, params=params, batch="n"
    )
    assert str(served.signature) == (
        "(images: float32[n, 4], extra/mask: bool[n, 5]) -> "
        "(output/logits: float32[n, 3], output/sum: int32[])"
    )
    assert served.platforms == ("cpu", "cuda", "tpu")
    assert served.num_parameters == 13
    assert repr(served).startswith("ServedModel((images: float32[n, 4], extra/mask")
    assert served.metadata == {
        "format": "sparsejax.serving",
        "version": "1",
        "platforms": ["cpu", "cuda", "tpu"],
        "num_parameters": 13,
        "parameter_bytes": 28,
        "jax_version": jax.__version__,
        "sparsejax_version": importlib.metadata.version("sparsejax"),
        **json.loads(json.dumps(served.signature.to_json())),
    }
    program = jax.export.deserialize(bytearray(_file.read(path)[0]["program"]))
    assert program.platforms == served.platforms
    assert {name: str(x.dtype) for name, x in weights_of(path).items()} == {
        "w": "bfloat16",
        "step": "int32",
    }


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit, nnx.remat])
def test_a_model_in_training_is_refused(path, wrap):
    model = Regularised(wrap, rngs=nnx.Rngs(0))
    with pytest.raises(
        serving.ServingError,
        match=r"this one changes drop/rngs/count, norm/mean, norm/var. Call model.eval",
    ):
        serving.export(model, path, ROWS)
    assert not path.exists()
    model.eval()
    serving.export(model, path, ROWS)
    assert sorted(weights_of(path)) == [
        "linear/bias",
        "linear/kernel",
        "norm/bias",
        "norm/mean",
        "norm/scale",
        "norm/var",
    ]


def test_many_changes_are_counted(path):
    model = nnx.Sequential(*(Regularised(rngs=nnx.Rngs(i)) for i in range(2)))
    with pytest.raises(serving.ServingError, match="layers/0/norm/var and 3 more"):
        serving.export(model, path, ROWS)


def test_random_keys_are_part_of_the_program(path):
    def noisy(params, x):
        return x + jax.random.normal(params["key"], (1, 4)) * params["scale"]

    params = {"key": jax.random.key(3), "scale": np.float32(2.0)}
    served = exported(path, noisy, ROWS, params=params)
    assert list(weights_of(path)) == ["scale"]
    np.testing.assert_allclose(served(ROWS), noisy(params, ROWS), rtol=1e-6)


def test_python_scalars_and_weak_types_keep_the_dtype(path):
    function = lambda params, x: x * params["weak"] + params["number"]
    params = {"weak": jnp.asarray(2.0), "number": 0.5}
    assert params["weak"].weak_type
    served = exported(path, function, ROWS.astype(jnp.bfloat16), params=params)
    assert list(weights_of(path)) == ["weak"]
    result = served(jnp.ones((1, 4), jnp.bfloat16))
    assert result.dtype == jnp.bfloat16
    assert result.tolist() == [[2.5] * 4]


def test_shared_weights_are_written_once(path):
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
            self.second = self.first

        def __call__(self, x):
            return self.second(self.first(x))

    model = Tied(nnx.Rngs(0))
    served = exported(path, model, ROWS)
    assert list(weights_of(path)) == ["first/kernel"]
    x = jnp.ones((1, 4))
    np.testing.assert_allclose(served(x), model(x), rtol=1e-5)


def test_a_partial_and_a_function_without_parameters(path):
    partial = jax.tree_util.Partial(lambda w, x: x + w, jnp.ones((1, 4)))
    assert exported(path, partial, ROWS)(ROWS).tolist() == [[1.0] * 4] * 2
    served = exported(
        path, lambda params, x: x + 2, ROWS, params={}, overwrite=True, batch=None
    )
    assert served.num_parameters == 0
    assert served(ROWS).tolist() == [[2.0] * 4] * 2


def test_arrays_of_numpy_are_what_jax_makes_of_them(path):
    params = np.full((1, 4), 2.0)
    served = exported(path, lambda w, x: w * x, np.ones((2, 4)), params=params)
    assert str(served.signature) == "(x: float32[b, 4]) -> (output: float32[b, 4])"
    assert served(np.ones((3, 4))).tolist() == [[2.0] * 4] * 3


def test_no_folder_of_this_machine_is_written(path):
    model = Regularised(rngs=nnx.Rngs(0))
    model.eval()
    option = "jax_hlo_source_file_canonicalization_regex"
    assert getattr(jax.config, option) is None
    serving.export(model, path, ROWS)
    assert getattr(jax.config, option) is None
    data = path.read_bytes()
    assert b"export_test.py" in data
    for folder in (ROOT, sys.prefix, pathlib.Path(nnx.__file__).parent):
        assert str(folder).encode() not in data


def test_what_exists_is_replaced_only_on_demand(path):
    function = lambda params, x: x + params
    path.write_text("theirs")
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        serving.export(function, path, ROWS, params=jnp.ones((1, 4)))
    assert path.read_text() == "theirs"
    served = exported(path, function, ROWS, params=jnp.ones((1, 4)), overwrite=True)
    assert served(ROWS).tolist() == [[1.0] * 4] * 2
    assert list(path.parent.iterdir()) == [path]


def bad(*inputs, model=lambda params, x: x, params=(), **arguments):
    return model, inputs, {"params": params, **arguments}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (bad(ROWS, platforms=("gpu",)), ValueError, r"of cpu, .*; got \('gpu',\)"),
        (bad(ROWS, platforms="cpu"), ValueError, "must be a sequence of cpu, "),
        (bad(ROWS, platforms=()), ValueError, r"got \(\)"),
        (bad(ROWS, batch="2*b"), ValueError, r"must be a name or None, got '2\*b'"),
        (
            bad(jnp.zeros(())),
            ValueError,
            r"common, got x: float32\[\]; pass batch=None",
        ),
        (
            bad({"a": ROWS, "b": ROWS[:1]}),
            ValueError,
            r"got x/a: float32\[2, 4\], x/b: float32\[1, 4\]; pass batch=None",
        ),
        (bad([1.0]), ValueError, "input x/0 must be an array of numbers, got 1.0"),
        (bad(jax.random.key(0)), ValueError, "input x must be an array of numbers"),
        (bad(), TypeError, "missing a required argument: 'x'"),
        (bad(ROWS, params=None), TypeError, "or a function with params="),
        (bad(ROWS, model={"a": 1}, params=None), TypeError, "not a callable object"),
        (
            bad(ROWS, model=nnx.Linear(4, 4, rngs=nnx.Rngs(0))),
            TypeError,
            "a module has its own",
        ),
        (
            bad(ROWS, params={"w": jnp.zeros(2, jnp.complex64)}),
            ValueError,
            "w must have one of the dtypes bool, uint8, .*; it has complex64",
        ),
    ],
)
def test_bad_arguments(path, arguments, error, message):
    model, inputs, options = arguments
    with pytest.raises(error, match=message):
        serving.export(model, path, *inputs, **options)
    assert list(path.parent.iterdir()) == []


def test_a_model_that_needs_the_batch_size_is_told_of_batch_none(path):
    function = lambda params, x: x * np.sqrt(x.shape[0])
    with pytest.raises(Exception, match="_DimExpr") as caught:
        serving.export(function, path, ROWS, params={})
    assert "batch=None takes the sizes" in caught.value.__notes__[-1]
    served = exported(path, function, ROWS, params={}, batch=None)
    assert str(served.signature) == "(x: float32[2, 4]) -> (output: float32[2, 4])"


def test_trees_that_jax_cannot_write_are_refused(path):
    class Output(NamedTuple):
        logits: jax.Array

    with pytest.raises(
        serving.ServingError, match="in dicts, lists and tuples.*Output"
    ):
        serving.export(lambda params, x: Output(x), path, ROWS, params={})
