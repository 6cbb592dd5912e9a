import types

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import analysis, compaction
from sparsejax.masks import Layout

RNG = np.random.default_rng(0)


def _member(path, axis, role, channels):
    return types.SimpleNamespace(path=path, axis=axis, role=role, channels=channels)


def _group(name, *members, removable=True):
    size = int(members[0].channels.max()) + 1
    return types.SimpleNamespace(
        name=name, size=size, members=members, removable=np.full(size, removable)
    )


def test_scores_are_means_over_all_weights_masked_or_not_and_over_the_producers():
    params = {"a": RNG.normal(size=(3, 3, 2, 4)), "b": RNG.normal(size=(5, 4))}
    masks = {"a": RNG.random((3, 3, 2, 4)) < 0.5, "b": None}
    own = np.arange(4)
    both = _group(
        "both", _member("a", 3, "producer", own), _member("b", 1, "producer", own)
    )
    found = analysis.channel_scores([both], params, masks)
    umm = [
        [abs(params["a"] * masks["a"])[..., c].sum() / 18 for c in range(4)],
        [abs(params["b"])[:, c].sum() / 5 for c in range(4)],
    ]
    np.testing.assert_allclose(found["both"], np.mean(umm, axis=0), rtol=1e-5)


def test_only_channels_that_are_produced_and_can_go_have_scores():
    params, own = {"w": jnp.ones((3, 3))}, np.arange(3)
    groups = [
        _group("inputs", _member("w", 0, "consumer", own)),
        _group("pinned", _member("w", 1, "producer", own), removable=False),
        _group("free", _member("w", 1, "producer", own)),
    ]
    masks = {"w": jnp.eye(3) > 0}
    report = types.SimpleNamespace(groups=groups)
    assert list(analysis.channel_scores(report, params, masks)) == ["free"]


def test_a_network_without_masks_has_scores():
    params = {"a": jnp.array([[1.0, -3.0]]), "b": jnp.ones((2, 1))}
    fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
    groups = compaction.channel_groups(fn, jnp.ones((1, 1)), params=params)
    found = analysis.channel_scores(groups, params, {"a": None, "b": None})
    np.testing.assert_array_equal(found["a"], [1, 3])


def test_criterion_and_layout_are_those_of_the_masks():
    params = {"w": np.ones((4, 2, 3))}
    masks = {"w": RNG.random((4, 2, 3)) < 0.5}
    group = _group("g", _member("w", 2, "producer", np.arange(3)))
    found = analysis.channel_scores(
        [group],
        params,
        masks,
        criterion="kernel_density",
        layout={"w": Layout(inputs=(0,))},
    )
    expected = masks["w"].any(axis=1).mean(axis=0)  # axis 1 is then spatial
    np.testing.assert_allclose(found["g"], expected, rtol=1e-6)
    with pytest.raises(ValueError, match="criterion must be one of"):
        analysis.channel_scores([group], params, masks, criterion="best")


def test_amenable_channels_lie_below_a_part_of_the_mean():
    scores = RNG.exponential(size=50)
    for below in (0.2, 0.5, 1.0):
        expected = [score < below * sum(scores) / 50 for score in scores]
        found = analysis.amenable_channels(scores, below=below)
        assert found.tolist() == expected and any(expected)
