import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import analysis
from sparsejax.masks import Layout

RNG = np.random.default_rng(0)


def _masks(shape):
    return RNG.random(shape) < 0.4


def test_fan_in_counts_over_all_inputs_and_the_window():
    masks = {
        "fc": {"kernel": _masks((7, 4)), "bias": None},
        "conv": _masks((3, 2, 5, 6)),
    }
    found = analysis.fan_in(masks)
    expected = {
        "conv": [int(masks["conv"][..., n].sum()) for n in range(6)],
        "fc/kernel": [int(masks["fc"]["kernel"][:, n].sum()) for n in range(4)],
    }
    assert {path: counts.tolist() for path, counts in found.items()} == expected


def test_vectors_have_no_fan_in():
    masks = {"kernel": jnp.ones((2, 3), bool), "bias": jnp.ones(3, bool)}
    assert list(analysis.fan_in(masks)) == ["kernel"]


def test_a_neuron_is_what_the_layout_says():
    heads, stack = _masks((5, 2, 3)), _masks((2, 4, 3))
    layout = {"stack": Layout(batch=(0,))}
    masks = {"query": {"kernel": heads}, "out": {"kernel": heads}, "stack": stack}
    found = analysis.fan_in(masks, layout=layout)
    np.testing.assert_array_equal(found["query/kernel"], heads.sum(axis=0).ravel())
    np.testing.assert_array_equal(found["out/kernel"], heads.sum(axis=(0, 1)))
    np.testing.assert_array_equal(found["stack"], stack.sum(axis=1))


def test_fan_in_over_time_has_a_row_for_each_step():
    history = {step: {"a": _masks((5, 3)), "b": None} for step in (0, 10, 30)}
    found = analysis.fan_in_over_time(history)
    expected = np.array([masks["a"].sum(axis=0) for masks in history.values()])
    np.testing.assert_array_equal(found["a"], expected)
    with pytest.raises(ValueError, match=r"fan_in_over_time.* must have a step"):
        analysis.fan_in_over_time({})


def test_births_and_deaths_are_changes_between_steps():
    live = RNG.random((6, 20)) < 0.5
    births, deaths = analysis.births_and_deaths(live)
    for t in range(5):
        before, after = set(np.flatnonzero(live[t])), set(np.flatnonzero(live[t + 1]))
        assert births[t] == len(after - before)
        assert deaths[t] == len(before - after)
