import dataclasses
import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from flax import nnx

from sparsejax.masks.layout import Layout, select_leaves

STACKED = Layout(batch=(0,))
QUERY = Layout(outputs=(-2, -1), inputs=(-3,))
OUT = Layout(outputs=(-1,), inputs=(-3, -2))


def weight(*shape):
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


# Weights as matrices


@pytest.mark.parametrize(
    ("layout", "shape", "transposed"),
    [
        (Layout(), (4, 6), lambda w: w.T),
        (Layout(), (3, 5, 4, 8), lambda w: w.transpose(3, 2, 0, 1).reshape(8, 60)),
        (Layout(), (3, 3, 1, 8), lambda w: w.transpose(3, 2, 0, 1).reshape(8, 9)),
        (Layout(), (3, 4, 6), lambda w: w.transpose(2, 1, 0).reshape(6, 12)),
        (Layout(), (7,), lambda w: w[:, None]),
        (QUERY, (12, 2, 4), lambda w: w.reshape(12, 8).T),
        (OUT, (2, 4, 10), lambda w: w.reshape(8, 10).T),
        (STACKED, (3, 4, 6), lambda w: w.transpose(0, 2, 1)),
        (
            STACKED,
            (2, 3, 5, 4, 8),
            lambda w: w.transpose(0, 4, 3, 1, 2).reshape(2, 8, 60),
        ),
        (Layout((0,), (1,)), (8, 4, 3, 3), lambda w: w.reshape(8, 36)),
        (Layout((-2,), (-1,)), (3, 3, 8, 4), lambda w: w.transpose(2, 3, 0, 1)),
    ],
)
def test_to_matrix_equals_a_transpose_by_hand(layout, shape, transposed):
    array = weight(*shape)
    expected = transposed(array).reshape(layout.matrix_shape(shape))
    matrix = layout.to_matrix(array)
    np.testing.assert_array_equal(matrix, expected)
    np.testing.assert_array_equal(layout.from_matrix(matrix, shape), array)


@st.composite
def layouts(draw):
    """Draw a shape and a layout of it, with axes counted from both ends."""
    ndim = draw(st.integers(1, 5))
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=ndim, max_size=ndim)))
    axes = draw(st.permutations([i - ndim * draw(st.booleans()) for i in range(ndim)]))
    ends = sorted(draw(st.lists(st.integers(1, ndim), min_size=3, max_size=3)))
    roles = np.split(np.array(axes), ends)[:3]
    return shape, Layout(*(tuple(map(int, role)) for role in roles))


@hypothesis.given(layouts())
def test_every_element_has_its_place_in_the_matrix(drawn):
    shape, layout = drawn
    array = weight(*shape)
    matrix = layout.to_matrix(array)
    assert matrix.shape == layout.matrix_shape(shape)
    np.testing.assert_array_equal(layout.from_matrix(matrix, shape), array)

    own = [[axis % len(shape) for axis in role] for role in dataclasses.astuple(layout)]
    outputs, inputs, batch = own
    spatial = [i for i in range(len(shape)) if i not in sum(own, [])]

    def place(index, axes):
        sizes = [shape[i] for i in axes]
        return int(np.ravel_multi_index([index[i] for i in axes], sizes)) if axes else 0

    for index in np.ndindex(*shape):
        row, column = place(index, outputs), place(index, inputs + spatial)
        layer = tuple(index[i] for i in batch)
        assert matrix[(*layer, row, column)] == array[index]


@hypothesis.given(layouts())
def test_a_layer_is_what_is_not_stacked_and_a_neuron_sums_over_the_rest(drawn):
    shape, layout = drawn
    ndim = len(shape)
    batch = {axis % ndim for axis in layout.batch}
    outputs = {axis % ndim for axis in layout.outputs}
    layer_axes = layout.layer_axes(ndim)
    if batch:
        assert layer_axes is not None and set(layer_axes) == {*range(ndim)} - batch
    else:
        assert layer_axes is None
    assert set(layout.fan_in_axes(ndim)) == {*range(ndim)} - batch - outputs
    *layers, neurons, fan_in = layout.matrix_shape(shape)
    assert math.prod(layout.layer_shape(shape)) == neurons * fan_in
    assert layout.layer_shape(shape)[0] == neurons
    assert layers == [shape[axis] for axis in layout.batch]


@pytest.mark.parametrize(
    ("layout", "shape", "layer_shape", "fan_in_axes", "layer_axes"),
    [
        (Layout(), (4, 6), (6, 4), (0,), None),
        (Layout(), (3, 5, 4, 8), (8, 4, 3, 5), (0, 1, 2), None),
        (Layout(), (3, 3, 1, 8), (8, 1, 3, 3), (0, 1, 2), None),
        (Layout(), (7,), (7,), (), None),
        (QUERY, (12, 2, 4), (8, 12), (0,), None),
        (OUT, (2, 4, 10), (10, 8), (0, 1), None),
        (STACKED, (3, 4, 6), (6, 4), (1,), (1, 2)),
        (Layout(batch=(0, 1)), (2, 3, 5, 4, 8), (8, 4, 5), (2, 3), (2, 3, 4)),
    ],
)
def test_layers_of_flax(layout, shape, layer_shape, fan_in_axes, layer_axes):
    assert layout.layer_shape(shape) == layer_shape
    assert layout.fan_in_axes(len(shape)) == fan_in_axes
    assert layout.layer_axes(len(shape)) == layer_axes


@pytest.mark.parametrize(
    ("layout", "ndim"),
    [
        (Layout(outputs=(2,)), 2),
        (Layout(inputs=(-3,)), 2),
        (Layout(outputs=(0,), inputs=(-2,)), 2),
        (Layout(batch=(0,)), 2),
        (Layout(outputs=(1, 1), inputs=(0,)), 2),
        (STACKED, 1),
        (Layout(), 0),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(layout, ndim):
    message = rf"^Layout\(outputs=.*different axes of an array of {ndim} dimensions"
    for method in (layout.resolve, layout.fan_in_axes, layout.layer_axes):
        with pytest.raises(ValueError, match=message):
            method(ndim)
    with pytest.raises(ValueError, match=message):
        layout.layer_shape((3,) * ndim)


# The modules of Flax

Conv = functools.partial(nnx.Conv, 4, 8, use_bias=False)
Attention = functools.partial(
    nnx.MultiHeadAttention, 2, 12, use_bias=False, decode=False
)


@pytest.mark.parametrize(
    ("make", "projection", "shape"),
    [
        (functools.partial(nnx.Linear, 4, 6, use_bias=False), None, (3, 4)),
        (functools.partial(Conv, 3), None, (2, 5, 4)),
        (functools.partial(Conv, (3, 3), feature_group_count=2), None, (2, 5, 5, 4)),
        (functools.partial(Conv, (3, 3), feature_group_count=4), None, (2, 5, 5, 4)),
        (Attention, "query", (3, 12)),
        (Attention, "value", (3, 12)),
        (Attention, "out", (3, 2, 6)),
    ],
    ids=["dense", "conv", "grouped", "depthwise", "query", "value", "out"],
)
def test_a_row_of_the_matrix_is_one_output(make, projection, shape):
    module = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    leaves = select_leaves(nnx.state(module))
    leaf = leaves[f"{projection}/kernel" if projection else "kernel"]
    module = getattr(module, projection) if projection else module
    graph, boxed = nnx.split(module)
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    matrix = leaf.layout.to_matrix(rng.normal(size=leaf.shape).astype(np.float32))
    factors = 2.0 ** np.arange(len(matrix), dtype=np.float32)

    @jax.jit
    def outputs(matrix):
        kernel = leaf.layout.from_matrix(matrix, leaf.shape)
        module = nnx.merge(graph, jax.tree.map(lambda _: kernel, boxed))
        return module(x).reshape(-1, len(matrix))

    before = outputs(matrix)
    after = outputs(matrix * factors[:, None])
    np.testing.assert_array_equal(after, before * factors[None])
    assert np.asarray(before).any(axis=0).all()
