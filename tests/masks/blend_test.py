import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import masks

SIZE = 64

FLOATS = ["float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "complex64"]
INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "bool"]
each_dtype = pytest.mark.parametrize("dtype", FLOATS + INTEGERS)


@pytest.fixture(autouse=True, scope="module")
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def special(dtype):
    """Return zeros, infinities, limits, denormals and NaN of several bits."""
    info = jnp.finfo(dtype)
    values = [0, 1, info.max, info.smallest_subnormal, info.smallest_normal, np.inf]
    values = np.array([*values, np.nan], dtype)
    quiet = np.array(np.nan, dtype).view(bits_of(dtype))
    odd = np.array([quiet | 1, quiet - 1], bits_of(dtype)).view(dtype)
    return np.concatenate([values, -values, odd, -odd])


def bits_of(dtype):
    return f"uint{8 * jnp.dtype(dtype).itemsize}"


def example(dtype, seed, shape=(SIZE,)):
    """Return an array of any bits, the special ones among them."""
    dtype = jnp.dtype(dtype)
    if dtype == "complex64":
        return example("float32", seed, (*shape, 2)).view(dtype)[..., 0]
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.random(shape) < 0.5
    words = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    array = words.view(dtype).reshape(shape)
    if not jnp.issubdtype(dtype, jnp.floating):
        return array
    return np.where(rng.random(shape) < 0.5, rng.choice(special(dtype), shape), array)


def wide(dtype):
    """Allow 64 bits for the dtypes that need them."""
    needed = dtype in ("float64", "int64")
    return jax.enable_x64(True) if needed else contextlib.nullcontext()


def assert_same_bits(result, expected):
    result = np.asarray(result)
    assert result.dtype == expected.dtype and result.shape == expected.shape
    assert result.tobytes() == expected.tobytes()


def both(mask, on, off):
    return masks.masked(mask, on), masks.blend(mask, on, off)


@each_dtype
@pytest.mark.parametrize("select", [jax.jit(both), both], ids=["compiled", "eager"])
def test_both_equal_a_select_bit_for_bit(dtype, select):
    on, off = example(dtype, 0), example(dtype, 1)
    mask = np.random.default_rng(2).random(SIZE) < 0.5
    with wide(dtype):
        given = [jnp.asarray(array) for array in (mask, on, off)]
        assert given[1].dtype == jnp.dtype(dtype)
        zeroed, blended = select(*given)
    assert_same_bits(zeroed, np.where(mask, on, np.zeros_like(on)))
    assert_same_bits(blended, np.where(mask, on, off))


@pytest.mark.parametrize("dtype", FLOATS[:3])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (2, 3, 5)], ids=str)
def test_arrays_of_any_shape(dtype, shape):
    on, off = example(dtype, 3, shape), example(dtype, 4, shape)
    select = jax.jit(both)
    for mask in (np.ones(shape, bool), np.zeros(shape, bool)):
        zeroed, blended = select(mask, on, off)
        assert_same_bits(zeroed, np.where(mask, on, np.zeros_like(on)))
        assert_same_bits(blended, np.where(mask, on, off))


@pytest.mark.parametrize("dtype", FLOATS[:3])
def test_what_is_masked_is_positive_zero(dtype):
    x = jnp.asarray(special(dtype))
    bits = np.asarray(masks.masked(jnp.zeros(x.shape, bool), x)).view(bits_of(dtype))
    assert not bits.any()


def test_gradients_are_those_of_a_select():
    mask = np.array([True, False, True])
    x, y = jnp.array([1.0, -2.0, 3.0]), jnp.array([4.0, 5.0, -6.0])
    gradient = jax.grad(lambda x: (masks.masked(mask, x) ** 2).sum())(x)
    assert gradient.tolist() == [2.0, 0.0, 6.0]
    blended = lambda x, y: (masks.blend(mask, x, y) ** 2).sum()
    gradients = jax.grad(blended, argnums=(0, 1))(x, y)
    assert [g.tolist() for g in gradients] == [[2.0, 0.0, 6.0], [0.0, 10.0, 0.0]]
