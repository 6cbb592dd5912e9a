import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import analysis


def test_overlap_is_the_jaccard_index_over_all_leaves():
    rng = np.random.default_rng(0)
    draw = lambda: {"a": rng.random((7, 5)) < 0.3, "b": None, "c": rng.random(9) < 0.6}
    history = {step: draw() for step in (0, 100, 250)}
    found = analysis.mask_overlap(history)
    active = [
        {(name, i) for name in "ac" for i in np.flatnonzero(masks[name])}
        for masks in history.values()
    ]
    expected = [[len(x & y) / len(x | y) for y in active] for x in active]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_masks_without_weights_have_no_overlap():
    found = analysis.mask_overlap({0: [jnp.zeros(3, bool)], 1: [jnp.arange(3) > 1]})
    np.testing.assert_array_equal(found, [[np.nan, 0], [0, 1]])


def test_the_masks_must_be_of_one_network():
    with pytest.raises(ValueError, match="must have a step"):
        analysis.mask_overlap({})
    mask = np.ones(3, bool)
    with pytest.raises(ValueError, match="of one network"):
        analysis.mask_overlap({0: {"a": mask}, 1: {"b": mask}})
    with pytest.raises(ValueError, match="of one network"):
        analysis.mask_overlap({0: {"a": mask}, 1: {"a": mask[:2]}})
