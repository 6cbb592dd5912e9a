import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from sparsejax import analysis

STEPS = [0, 10, 30]


@pytest.fixture
def ax():
    return Figure().subplots()


def test_neurons_lie_by_how_long_they_live_and_their_last_fan_in(ax):
    fan_in = np.array(
        [
            [2, 3, 0, 1, 4],
            [2, 5, 0, 0, 4],
            [1, 5, 0, 0, 0],
        ]
    )
    assert analysis.plot_neurons(fan_in, STEPS, ax=ax) is ax
    (mesh,) = ax.collections
    np.testing.assert_array_equal(
        mesh.get_array().filled(-1),
        [[3, 5, 5], [2, 2, 1], [4, 4, -1], [1, -1, -1], [-1, -1, -1]],
    )
    assert mesh.norm.vmax == 5
    bar = mesh.colorbar
    assert bar.get_ticks().tolist() == [1, 2, 5]
    assert [label.get_text() for label in bar.ax.get_yticklabels()] == ["1", "2", "5"]


def test_a_network_of_dead_neurons_is_drawn(ax):
    analysis.plot_neurons(np.zeros((3, 2), int), STEPS, ax=ax)
    assert ax.collections[0].get_array().mask.all()


def test_births_go_up_and_deaths_down_at_the_step_that_shows_them(ax):
    live = np.array([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 1, 1]], bool)
    analysis.plot_births_and_deaths(live, STEPS, ax=ax)
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in ax.patches]
    assert bars == [(10, 1), (30, 1), (10, -2), (30, 0)]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "births: 2",
        "deaths: 2",
    ]
    assert ax.yaxis.get_major_formatter()(-2) == "2"


def test_weights_of_layers_lie_one_on_the_other(ax):
    active = {"first": np.array([5, 4, 3]), "second": np.array([1, 2, 4])}
    analysis.plot_weights(active, STEPS, ax=ax)
    tops = [band.get_paths()[0].vertices[:, 1].max() for band in ax.collections]
    assert tops == [5, 7]
    colors = [to_rgba(band.get_facecolor()[0]) for band in ax.collections]
    assert sum(colors[0][:3]) < sum(colors[1][:3])  # from dark to light
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["second", "first"]  # as they lie


def test_overlap_has_a_cell_for_every_two_steps(ax):
    overlap = np.array([[1, 0.5, 0.1], [0.5, 1, 0.3], [0.1, 0.3, 1]])
    analysis.plot_overlap(overlap, STEPS, ax=ax)
    (mesh,) = ax.collections
    np.testing.assert_array_equal(mesh.get_array(), overlap)
    assert mesh.get_clim() == (0, 1)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: analysis.plot_neurons(np.ones((2, 5), int), STEPS),
        lambda: analysis.plot_births_and_deaths(np.ones((2, 5), bool), STEPS),
        lambda: analysis.plot_weights({"fc": np.ones(2)}, STEPS),
        lambda: analysis.plot_overlap(np.ones((2, 2)), STEPS),
    ],
)
def test_there_is_a_row_for_each_step(draw):
    with pytest.raises(ValueError, match=r"one row for each of 3 steps, got 2\."):
        draw()
