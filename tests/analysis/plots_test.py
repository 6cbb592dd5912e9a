import numpy as np
import pytest
from matplotlib.figure import Figure

from sparsejax import analysis


@pytest.fixture
def ax():
    return Figure().subplots()


def test_a_mask_has_a_row_for_each_input_and_a_column_for_each_neuron(ax):
    mask = np.random.default_rng(0).random((3, 3, 2, 5)) < 0.5
    assert analysis.plot_mask(mask, ax=ax) is ax
    (image,) = ax.get_images()
    np.testing.assert_array_equal(image.get_array(), mask.reshape(18, 5))


def test_input_connections_count_the_weights_at_a_pixel(ax):
    mask = np.zeros((2 * 3 * 2, 4), bool)
    mask[0, :3] = True  # pixel (0, 0), channel 0
    mask[1, :1] = True  # pixel (0, 0), channel 1
    mask[11] = True  # pixel (1, 2), channel 1
    analysis.plot_input_connections(mask, (2, 3, 2), vmax=9, ax=ax)
    (image,) = ax.get_images()
    np.testing.assert_array_equal(image.get_array(), [[4, 0, 0], [0, 0, 4]])
    assert image.get_clim() == (0, 9)


@pytest.mark.parametrize("shape", [(12, 4), (3, 3, 2, 4)])
def test_input_connections_need_a_row_for_each_value_of_an_image(ax, shape):
    with pytest.raises(ValueError, match=r"mask of 18 rows, .* image \(3, 3, 2\)"):
        analysis.plot_input_connections(np.ones(shape, bool), (3, 3, 2), ax=ax)


def test_densities_are_bars_from_the_top_with_their_values(ax):
    analysis.plot_densities({"first": 0.25, "second": 0.5}, ax=ax)
    assert [bar.get_width() for bar in ax.patches] == [0.25, 0.5]
    assert [label.get_text() for label in ax.texts] == ["25.0%", "50.0%"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["first", "second"]
    assert ax.yaxis_inverted()
