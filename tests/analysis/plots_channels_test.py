import types

import numpy as np
import pytest
from matplotlib.figure import Figure

from sparsejax import analysis


@pytest.fixture
def ax():
    return Figure().subplots()


def _legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_fan_in_is_a_falling_line_for_each_name(ax):
    fan_in = {"one": np.array([0, 7, 2]), "two": np.array([3, 3])}
    assert analysis.plot_fan_in(fan_in, ax=ax) is ax
    lines = [line.get_xydata().tolist() for line in ax.get_lines()]
    assert lines == [[[1, 7], [2, 2], [3, 0]], [[1, 3], [2, 3]]]
    assert _legend(ax) == ["one: 2 of 3 live", "two: 2 of 2 live"]


def test_amenable_channels_are_behind_the_others(ax):
    scores = np.array([0.0, 1.0, 0.2, 1.8, 0.0])  # half of the mean is 0.3
    analysis.plot_channels(scores, ax=ax)
    others, amenable = (step.get_data() for step in ax.patches)
    np.testing.assert_array_equal(others.values, [1.8, 1.0])
    np.testing.assert_array_equal(others.edges, [0, 1, 2])
    np.testing.assert_array_equal(amenable.values, [0.2, 0, 0])
    np.testing.assert_array_equal(amenable.edges, [2, 3, 4, 5])
    (line,) = ax.get_lines()
    np.testing.assert_allclose(line.get_ydata(), 0.3)
    assert _legend(ax) == ["2 others", "3 amenable, 2 empty"]


def test_there_may_be_no_amenable_channel(ax):
    analysis.plot_channels(np.ones(3), ax=ax)
    assert _legend(ax) == ["3 others", "0 amenable, 0 empty"]


def test_compaction_shows_what_is_left_of_groups_that_can_shrink(ax):
    group = lambda name, size, removable: types.SimpleNamespace(
        name=name, size=size, removable=np.full(size, removable)
    )
    report = types.SimpleNamespace(
        groups=[group("a", 8, True), group("out", 3, False), group("b", 4, True)],
        removed={"a": 5},
    )
    analysis.plot_compaction(report, ax=ax)
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == [8, 4, 3, 4]  # before, then what is left
    assert [label.get_text() for label in ax.texts] == ["3 of 8", "4 of 4"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert ax.yaxis_inverted()
