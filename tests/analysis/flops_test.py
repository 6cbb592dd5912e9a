from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sparsejax import models
from sparsejax.analysis import flops


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def giga_multiply_adds(build, size):
    model = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    return flops(model, shape(1, size, size, 3)) / 2e9


@pytest.mark.parametrize(
    ("build", "published"),
    [
        (partial(models.resnet, 18), 1.814),
        (partial(models.resnet, 34), 3.664),
        (partial(models.resnet, 50), 4.089),
        (partial(models.vgg, 16), 15.470),
        (partial(models.vgg, 19), 19.632),
        (models.mobilenet_v2, 0.301),
        (models.vit_b16, 17.564),
    ],
    ids=["resnet18", "resnet34", "resnet50", "vgg16", "vgg19", "mobilenet_v2", "vit"],
)
def test_networks_for_imagenet_cost_what_torchvision_says(build, published):
    """Its tables count multiply-adds, of contractions and convolutions alone."""
    assert round(giga_multiply_adds(build, 224), 3) == published


@pytest.mark.parametrize(
    ("width_multiplier", "published"),
    [(1.0, 0.569), (0.75, 0.325), (0.5, 0.149), (0.25, 0.041)],
)
def test_mobilenet_v1_costs_what_its_paper_says(width_multiplier, published):
    build = partial(models.mobilenet_v1, width_multiplier=width_multiplier)
    assert round(giga_multiply_adds(build, 224), 3) == published


@pytest.mark.parametrize(
    ("build", "size", "published", "tolerance"),
    [
        # SRigL counts 8.19e9 operations and Chase 8.2e9, two to a multiply-add.
        (partial(models.resnet, 50), 224, 8.19 / 2, 2e-3),
        # Structure-LTH has 0.2 % more, presumably for biases and BatchNorm.
        (partial(models.vgg_cifar, 16), 32, 0.314, 3e-3),
        (models.vit_s16, 224, 4.6, 1e-3),  # DeiT-S in Swin's Table 1
    ],
)
def test_networks_cost_what_the_papers_say(build, size, published, tolerance):
    counted = giga_multiply_adds(build, size)
    assert counted == pytest.approx(published, rel=tolerance)


@pytest.mark.parametrize(
    ("fn", "shapes", "multiply_adds"),
    [
        (jnp.dot, [(2, 8), (8, 4)], 2 * 8 * 4),
        (jnp.dot, [(8,), (8,)], 8),
        (jnp.matmul, [(5, 2, 8), (5, 8, 4)], 5 * 2 * 8 * 4),
        (jax.vmap(jnp.dot), [(5, 8), (5, 8)], 5 * 8),
        (partial(jnp.einsum, "bij,bkij->bk"), [(5, 2, 3), (5, 7, 2, 3)], 5 * 7 * 6),
        (partial(jnp.tensordot, axes=0), [(3,), (4,)], 12),
        (jnp.add, [(8, 4), (8, 4)], 0),
        (jnp.linalg.norm, [(8, 4)], 0),
    ],
)
def test_matrix_products(fn, shapes, multiply_adds):
    assert flops(fn, *(shape(*dims) for dims in shapes)) == 2 * multiply_adds


@pytest.mark.parametrize(
    ("options", "out", "taps"),
    [
        (dict(), 8 * 8 * 6, 9 * 4),
        (dict(strides=2), 4 * 4 * 6, 9 * 4),
        (dict(strides=(1, 2)), 8 * 4 * 6, 9 * 4),
        (dict(padding="VALID"), 6 * 6 * 6, 9 * 4),
        (dict(kernel_dilation=2), 8 * 8 * 6, 9 * 4),
        (dict(feature_group_count=2), 8 * 8 * 6, 9 * 2),
        (dict(kernel_size=(1, 5)), 8 * 8 * 6, 5 * 4),
    ],
    ids=str,
)
def test_convolutions(options, out, taps):
    options = dict(kernel_size=(3, 3)) | options
    model = nnx.eval_shape(lambda: nnx.Conv(4, 6, rngs=nnx.Rngs(0), **options))
    assert flops(model, shape(5, 8, 8, 4)) == 2 * 5 * out * taps


def test_depthwise_convolution():
    build = lambda: nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=nnx.Rngs(0))
    assert flops(nnx.eval_shape(build), shape(1, 8, 8, 4)) == 2 * 8 * 8 * 4 * 9


@pytest.mark.parametrize("layout", ["NCHW", "HWNC"])
def test_convolution_in_another_layout(layout):
    sizes = dict(N=5, H=8, W=7, C=4)
    convolve = partial(
        lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=(layout, "OIHW", layout),
    )
    images = shape(*(sizes[axis] for axis in layout))
    assert flops(convolve, images, shape(6, 4, 3, 3)) == 2 * 5 * 8 * 7 * 6 * 4 * 9


def test_transposed_convolution_does_not_count_the_zeros_it_inserts():
    """Every pixel meets every tap, but for those that fall off the border."""
    build = lambda: nnx.ConvTranspose(
        4, 6, (2, 2), strides=(2, 2), padding="VALID", rngs=nnx.Rngs(0)
    )
    assert flops(nnx.eval_shape(build), shape(1, 8, 8, 4)) == 2 * 64 * 4 * 4 * 6


@pytest.mark.parametrize("strides", [1, 2])
def test_gradients_cost_twice_the_forward_pass(strides):
    convolve = partial(
        lax.conv_general_dilated,
        window_strides=(strides, strides),
        padding=[(1, 1), (1, 1)],
        feature_group_count=2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    arguments = shape(3, 8, 8, 4), shape(3, 3, 2, 6)
    loss = lambda *arguments: jnp.tanh(convolve(*arguments)).sum()
    once = flops(convolve, *arguments)
    thrice = flops(jax.value_and_grad(loss, argnums=(0, 1)), *arguments)
    assert thrice == pytest.approx(3 * once, rel=0.1 if strides == 2 else 0)


def square(x):
    return x @ x


def custom_jvp(x):
    fn = jax.custom_jvp(square)
    fn.defjvp(lambda primals, tangents: (square(*primals), square(*tangents)))
    return fn(x)


def custom_vjp(x):
    fn = jax.custom_vjp(square)
    fn.defvjp(lambda x: (square(x), x), lambda x, g: (g @ square(x),))
    return fn(x)


def custom_vmap(x):
    fn = jax.custom_batching.custom_vmap(square)
    fn.def_vmap(lambda size, batched, x: (square(x), True))
    return fn(x)


def scanned(x):
    return lax.scan(lambda x, _: (square(x), None), x, length=7)[0]


def on_eight_devices(x):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    local = lambda x: square(x @ x.T)
    return jax.shard_map(local, mesh=mesh, in_specs=P("a"), out_specs=P("a"))(x)


@pytest.mark.parametrize(
    ("fn", "products"),
    [
        (jax.jit(jax.jit(square)), 1),
        (jax.checkpoint(lambda x: square(jnp.sin(square(x)))), 2),
        (custom_jvp, 1),
        (custom_vjp, 1),
        (custom_vmap, 1),
        (scanned, 7),
        (lambda x: lax.map(lambda row: row @ x, x), 1),
        (lambda x: lax.fori_loop(0, 5, lambda _, x: scanned(x), x), 35),
        (lambda x: lax.cond(x[0, 0] > 0, scanned, square, x), 7),
        (lambda x: lax.switch(0, [jnp.sin, square, jnp.cos], x), 1),
        (lambda x: lax.while_loop(lambda x: x[0, 0] > 0, jnp.sin, square(x)), 1),
    ],
    ids=[
        "jit",
        "remat",
        "custom_jvp",
        "custom_vjp",
        "custom_vmap",
        "scan",
        "map",
        "nested",
        "cond",
        "switch",
        "while",
    ],
)
def test_calls_loops_and_branches(fn, products):
    assert flops(fn, shape(8, 8)) == products * 2 * 8**3


def test_recomputation_counts():
    loss = lambda x: jax.checkpoint(lambda x: jnp.sin(square(x)))(x).sum()
    plain = lambda x: jnp.sin(square(x)).sum()
    forward = flops(plain, shape(8, 8))
    assert flops(jax.grad(plain), shape(8, 8)) == 3 * forward
    assert flops(jax.grad(loss), shape(8, 8)) == 4 * forward


def test_shard_map_counts_on_every_device():
    """Two devices along "b" each do what four along "a" share: [2, 8] by [8, 2]."""
    each = 2 * (2 * 8 * 2 + 2**3)
    assert flops(on_eight_devices, shape(8, 8)) == 8 * each


def test_nothing_is_run_and_the_module_is_as_it_was():
    model = models.ResNet((1,), (4,), 3, rngs=nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.state(model))
    images = shape(10**7, 512, 512, 3)
    in_training = flops(model, images)
    model.eval()
    assert flops(model, images) == in_training > 10**15
    after = nnx.state(model)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_inputs_are_trees_of_arrays_or_of_shapes():
    layer = lambda params, x: x @ params["kernel"] + params["bias"]
    params = {"kernel": np.ones((8, 4)), "bias": shape(1, 4)}
    assert flops(layer, params, jnp.ones((2, 8))) == 128


def test_symbolic_shapes_are_refused():
    (batch,) = jax.export.symbolic_shape("b")
    with pytest.raises(
        ValueError, match=r"got the shape \(b, 8\) .*_inputs\[1\]\['x'\]"
    ):
        flops(lambda w, batch: batch["x"] @ w, shape(8, 4), {"x": shape(batch, 8)})


@pytest.mark.parametrize(
    ("fn", "primitive"),
    [
        (lambda x: lax.while_loop(lambda x: x[0, 0] > 0, square, x), "while"),
        (lambda x: lax.while_loop(lambda x: square(x)[0, 0] > 0, jnp.sin, x), "while"),
        (
            lambda x: lax.fori_loop(0, x.astype(int)[0, 0], lambda _, x: square(x), x),
            "while",
        ),
        (
            lambda x: lax.custom_linear_solve(
                lambda b: square(x) @ b, x[0], solve=lambda product, b: product(b)
            ),
            "custom_linear_solve",
        ),
    ],
)
def test_loops_of_unknown_length_are_refused(fn, primitive):
    with pytest.raises(
        ValueError, match=rf"operations inside the primitive '{primitive}'"
    ):
        flops(fn, shape(8, 8))
