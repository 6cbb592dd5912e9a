import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from sparsejax import analysis, models, sparse_optax


def lines(params, masks):
    """The cells of each line by the first of them."""
    table = analysis.summary(params, masks).splitlines()
    assert len({len(line) for line in table}) == 1
    return {cells[0]: cells[1:] for cells in (re.split(" {2,}", x) for x in table)}


def test_lines_count_the_masks_of_a_network():
    model = models.lenet_300_100(64, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    tx = sparse_optax.rigl(optax.sgd(0.1), sparsity=0.95)
    masks = sparse_optax.get_masks(tx.init(params))
    found = lines(params, masks)
    kernels = [masks["layers"][i]["kernel"] for i in range(3)]
    for i, mask in enumerate(kernels):
        active, density = int(mask.sum()), f"{float(mask.mean()):.2%}"
        shape = "x".join(map(str, mask.shape))
        expected = [shape, f"{active:,}", f"{mask.size:,}", density]
        assert found[f"layers/{i}/kernel"] == expected
    assert found["layers/1/bias"] == ["100", "100", "100", "dense"]
    active, size = sum(int(mask.sum()) for mask in kernels), 50_200
    assert found["sparse"] == [f"{active:,}", f"{size:,}", f"{active / size:.2%}"]
    active, size = active + 410, size + 410
    assert found["all"] == [f"{active:,}", f"{size:,}", f"{active / size:.2%}"]


def test_a_dense_network_needs_no_masks():
    shapes = {"kernel": jax.ShapeDtypeStruct((3, 4), jnp.float32)}
    found = lines(shapes, None)
    assert found["kernel"] == ["3x4", "12", "12", "dense"]
    assert found["sparse"] == ["0", "0", "0.00%"]
    assert found["all"] == ["12", "12", "100.00%"]


@pytest.mark.parametrize("path", ["kernel", "other"])
def test_masks_of_another_network_are_refused(path):
    masks = {path: jnp.ones((2, 3), bool)}
    with pytest.raises(ValueError, match=rf"{path} has the shape \(2, 3\) .*'kernel'"):
        analysis.summary({"kernel": jnp.ones((2, 2))}, masks)
