"""Blocks, and convolutions and linear layers by them, against NumPy and XLA."""

import functools
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.serving import Blocks, block_sparse_conv, block_sparse_linear
from sparsejax.serving.block_sparse import FORMS, window

TOLERANCES = {"float32": 1e-5, "bfloat16": 4e-2, "float16": 5e-3}

# Of kernel, strides, padding and image. Rows 5 and 7 of the kernel are in no block.
GEOMETRIES = {
    "3x3": ((3, 3), 1, 1, (5, 7)),
    "3x3, stride 2, SAME, odd": ((3, 3), 2, "SAME", (7, 6)),
    "3x3, strides, no padding": ((3, 3), (1, 2), "VALID", (6, 8)),
    "1x1": ((1, 1), 1, 0, (3, 4)),
    "1x1, stride 2": ((1, 1), 2, "SAME", (5, 5)),
    "2x4, uneven padding": ((2, 4), (2, 1), ((0, 3), (1, 2)), (3, 5)),
    "one row": ((3, 3), 2, (1, 1), (2, 1)),
}


def random_pairs(rng, shape, rows=((3, 0, 9), (1,), (8, 2, 6, 4))):
    """Return blocks of uneven sizes, in no order, that leave out rows 5 and 7."""
    columns = int(np.prod(shape[:-1]))
    sizes = [max(1, columns // 2), columns, max(1, columns // 4)]
    return [
        (np.array(own), rng.permutation(columns)[:size])
        for own, size in zip(rows, sizes, strict=True)
    ]


def numpy_conv(x, kernel, strides, pads):
    """Convolve in float64, by the definition."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *pads, (0, 0)))
    kernel = np.asarray(kernel, np.float64)
    (kh, kw), (down, right) = kernel.shape[:2], strides
    height = (x.shape[1] - kh) // down + 1
    width = (x.shape[2] - kw) // right + 1
    out = np.zeros((len(x), height, width, kernel.shape[-1]))
    for i in range(height):
        for j in range(width):
            part = x[:, i * down : i * down + kh, j * right : j * right + kw]
            out[:, i, j] = np.tensordot(part, kernel, 3)
    return out


def dense_conv(x, kernel, strides, padding):
    steps, pads = window(x.shape[1:3], kernel.shape[:2], strides, padding)
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, steps, pads, None, None, numbers)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolution_and_its_gradients_equal_those_of_the_masked_kernel(geometry):
    size, strides, padding, image = GEOMETRIES[geometry]
    rng = np.random.default_rng(0)
    blocks = Blocks((*size, 4, 10), random_pairs(rng, (*size, 4, 10)))
    kernel = jnp.asarray(rng.normal(size=blocks.shape) * blocks.mask, jnp.float32)
    assert (kernel < 0).any() and not kernel[..., [5, 7]].any()
    x = jnp.asarray(rng.normal(size=(3, *image, 4)), jnp.float32)
    steps, pads = window(image, size, strides, padding)
    expected = numpy_conv(x, kernel, steps, pads)
    cotangent = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)

    @jax.jit
    def dense(x, kernel):
        y, pull = jax.vjp(lambda *a: dense_conv(*a, strides, padding), x, kernel)
        return y, *pull(cotangent)

    @jax.jit
    def by_blocks(x, weights):
        options = {"strides": strides, "padding": padding}
        results = {}
        for form in FORMS:
            run = functools.partial(
                block_sparse_conv, blocks=blocks, form=form, **options
            )
            y, pull = jax.vjp(run, x, weights)
            results[form] = (y, *pull(cotangent))
        return results

    y, x_grad, kernel_grad = dense(x, kernel)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    weights = blocks.split(kernel)
    wanted = blocks.split(kernel_grad)
    for form, (own, own_x_grad, grads) in by_blocks(x, weights).items():
        np.testing.assert_allclose(own, expected, atol=1e-5, err_msg=form)
        assert (own[..., [5, 7]] == 0).all()
        np.testing.assert_allclose(own_x_grad, x_grad, atol=1e-5, err_msg=form)
        for one, other in zip(grads, wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=3e-5, err_msg=form)


@pytest.mark.slow
@hypothesis.given(
    size=st.tuples(*[st.integers(1, 3)] * 2),
    strides=st.tuples(*[st.integers(1, 3)] * 2),
    pads=st.tuples(*[st.tuples(*[st.integers(0, 2)] * 2)] * 2),
    image=st.tuples(*[st.integers(3, 6)] * 2),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_geometry(size, strides, pads, image, batch, seed):
    rng = np.random.default_rng(seed)
    shape = (*size, 3, 10)
    blocks = Blocks(shape, random_pairs(rng, shape))
    kernel = jnp.asarray(rng.normal(size=shape) * blocks.mask, jnp.float32)
    x = jnp.asarray(rng.normal(size=(batch, *image, 3)), jnp.float32)
    form = FORMS[seed % len(FORMS)]
    run = jax.jit(
        functools.partial(
            block_sparse_conv, blocks=blocks, form=form, strides=strides, padding=pads
        )
    )
    expected = numpy_conv(x, kernel, strides, pads)
    np.testing.assert_allclose(run(x, blocks.split(kernel)), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_dtypes_of_linear_layers_and_convolutions(dtype):
    rng = np.random.default_rng(0)
    blocks = Blocks((40, 10), random_pairs(rng, (40, 10)))
    kernel = jnp.asarray(rng.normal(size=(40, 10)) * blocks.mask, dtype)
    x = jnp.asarray(rng.normal(size=(2, 3, 40)), dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    image = x.reshape(2, 3, 1, 40)
    as_conv = Blocks((1, 1, 40, 10), blocks.blocks)

    @jax.jit
    def run(x, image, weights):
        return {
            form: (
                block_sparse_linear(x, weights, blocks, form=form),
                block_sparse_conv(image, weights, as_conv, form=form)[:, :, 0],
                block_sparse_linear(x[0, 0], weights, blocks, form=form),
            )
            for form in FORMS
        }

    atol = TOLERANCES[dtype] * np.abs(expected).max()
    for results in run(x, image, blocks.split(kernel)).values():
        wanted = (expected, expected, expected[0, 0])
        for own, other in zip(results, wanted, strict=True):
            assert own.dtype == dtype
            np.testing.assert_allclose(np.asarray(own, np.float64), other, atol=atol)


def test_blocks_are_the_matrix_of_the_kernel():
    rng = np.random.default_rng(0)
    shape = (3, 2, 5, 10)
    pairs = random_pairs(rng, shape)
    blocks = Blocks(shape, pairs)
    kernel = rng.normal(size=shape)
    matrix = kernel.transpose(3, 0, 1, 2).reshape(10, 30)  # (r * 2 + s) * 5 + c
    mask = np.zeros((10, 30), bool)
    for rows, columns in pairs:
        mask[np.ix_(rows, columns)] = True
    masked = np.where(mask, matrix, 0).reshape(10, 3, 2, 5).transpose(1, 2, 3, 0)
    np.testing.assert_array_equal(blocks.mask, masked != 0)
    assert blocks.density == mask.mean()
    weights = blocks.split(kernel)
    for weight, (rows, columns) in zip(weights, blocks.blocks, strict=True):
        assert (np.diff(rows) > 0).all() and (np.diff(columns) > 0).all()
        np.testing.assert_array_equal(
            weight, matrix[np.ix_(rows, columns)].astype("f4")
        )
    np.testing.assert_array_equal(blocks.join(weights), masked.astype("f4"))


def test_blocks_of_the_same_columns_are_joined_and_empty_ones_left_out():
    rows, columns = np.arange(8), np.array([1, 3, 4])
    one = Blocks((6, 8), [(rows, columns)])
    cut = [(rows[5:], columns), ([], [0]), (rows[:5], columns[::-1])]
    two = Blocks((6, 8), cut)
    assert one == two and hash(one) == hash(two) and len(two.blocks) == 1
    assert one != Blocks((6, 8), [(rows, columns[:2])])
    assert one != Blocks((1, 1, 6, 8), [(rows, columns)])
    assert repr(two) == "Blocks((6, 8), 8x3)"
    calls = []

    @functools.partial(jax.jit, static_argnums=1)
    def traced(x, blocks):
        calls.append(blocks)
        return x

    traced(1.0, one), traced(1.0, two)
    assert len(calls) == 1


def test_take_follows_channels_that_were_removed():
    rng = np.random.default_rng(0)
    shape = (2, 2, 6, 10)
    blocks = Blocks(shape, random_pairs(rng, shape))
    inputs, outputs = np.array([0, 2, 5]), np.array([0, 1, 3, 4, 5, 8])
    taken = blocks.take((None, None, inputs, outputs))
    assert taken.shape == (2, 2, 3, 6)
    np.testing.assert_array_equal(taken.mask, blocks.mask[..., inputs, :][..., outputs])


def test_full_blocks():
    blocks = Blocks.full((12, 3))
    assert blocks.mask.all() and blocks.density == 1


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ([([0, 1], [0]), ([1, 2], [3])], ValueError, r"block 1 must .* got \[1\]"),
        ([([0, 8], [0])], ValueError, r"rows .*\[0, 8\).*got \[8\]"),
        ([([0], [0, -1])], ValueError, r"columns .*\[0, 6\).*got \[-1\]"),
        ([([0, 0], [1])], ValueError, r"must be different"),
        ([([0.5], [1])], TypeError, "must be integers, got float64"),
    ],
)
def test_wrong_blocks(pairs, error, message):
    with pytest.raises(error, match=message):
        Blocks((6, 8), pairs)


def test_wrong_calls():
    blocks = Blocks((3, 3, 2, 4), [([0, 1], [0, 5, 7])])
    weights = blocks.split(jnp.ones(blocks.shape))
    x = jnp.ones((1, 5, 5, 2))
    with pytest.raises(ValueError, match=r"Blocks\(shape\) must be that of a kernel"):
        Blocks((2, 3, 4), [])
    with pytest.raises(ValueError, match=r"those of a kernel \(3, 3, 2, 4\), got"):
        blocks.split(jnp.ones((3, 3, 4, 2)))
    with pytest.raises(ValueError, match=r"images \[batch, h, w, in\].*\(1, 5, 5, 3\)"):
        block_sparse_conv(jnp.ones((1, 5, 5, 3)), weights, blocks)
    with pytest.raises(ValueError, match=r"vectors \[..., in\] and blocks of a kernel"):
        block_sparse_linear(x, weights, blocks)
    with pytest.raises(ValueError, match=r"\(form=...\) must be one of .* got 'fast'"):
        block_sparse_conv(x, weights, blocks, form="fast")
    with pytest.raises(ValueError, match=r"shapes of the blocks, \[\(2, 3\)\], got"):
        block_sparse_conv(x, (weights[0].T,), blocks)
    with pytest.raises(ValueError, match="needs at least one block"):
        block_sparse_conv(x, (), Blocks(blocks.shape, []))
    with pytest.raises(ValueError, match="at least 3 x 3 pixels.* got 2 x 5"):
        block_sparse_conv(x[:, :2], weights, blocks, padding="VALID")


def test_functions_do_without_flax():
    code = (
        "import sys; from sparsejax import serving; serving.block_sparse_conv; "
        "print([name for name in ('flax', 'optax') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
