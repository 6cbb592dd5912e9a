import numpy as np
import pytest

from configs import base
from experiments import data, pictures
from experiments.seeds import Round, mean_and_interval

FIRST = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool)
LATER = np.array([[1, 0, 1, 0], [0, 0, 1, 1]], bool)


def a_round(step, *, loss=1.0, accuracies=(0.5, 0.7), masks=None):
    return Round(step, np.full((5, 2), loss), np.array(accuracies), masks, 1.0)


def masks(mask):
    return {"fc": {"kernel": np.stack([mask, mask]), "bias": None}}


def points(line):
    return dict(zip(*line.get_data(), strict=True))


def test_training_draws_means_and_intervals():
    rounds = [a_round(5, loss=2.0), a_round(10, accuracies=(0.8, 0.9))]
    figure = pictures.training({"one": rounds, "other": rounds[:1]})
    losses, errors = figure.axes
    assert [points(line) for line in losses.lines] == [{5: 2.0, 10: 1.0}, {5: 2.0}]
    assert points(errors.lines[0]) == pytest.approx({5: 0.4, 10: 0.15})
    assert [text.get_text() for text in errors.get_legend().texts] == ["one", "other"]
    assert len({line.get_color() for line in errors.lines}) == 2
    _, half = mean_and_interval([0.2, 0.1])
    band = errors.collections[0].get_paths()[0].vertices
    assert max(y for x, y in band if x == 10) == pytest.approx(0.15 + half)


def test_layers_follow_density_and_replacement():
    dense = np.ones((2, 4), bool)
    pruned = [a_round(5, masks=masks(dense)), a_round(10, masks=masks(FIRST))]
    moved = [
        a_round(step, masks=masks(mask))
        for step, mask in [(5, FIRST), (10, LATER), (15, LATER)]
    ]
    figure = pictures.layers(pruned, moved, masks(FIRST))
    at_the_end, over_time, replaced = figure.axes
    assert [bar.get_width() for bar in at_the_end.patches] == [0.5]
    assert points(over_time.lines[0]) == {5: 1.0, 10: 0.5}
    assert points(replaced.lines[0]) == {5: 0.0, 10: 0.25, 15: 0.0}


def test_masks_stand_one_below_the_other():
    figure = pictures.masks({"before": FIRST, "after": LATER})
    assert [ax.get_title() for ax in figure.axes] == ["before", "after"]
    for ax, mask in zip(figure.axes, (FIRST, LATER), strict=True):
        np.testing.assert_array_equal(ax.get_images()[0].get_array(), mask)


def test_connections_share_a_scale():
    digits = data.load(base.Data("digits"))
    few, many = np.eye(64, 3) > 0, np.ones((64, 5), bool)
    figure = pictures.connections(digits, {"few": few, "many": many})
    variation, *counts = [ax for ax in figure.axes if ax.get_images()]
    np.testing.assert_allclose(
        variation.get_images()[0].get_array(), digits.train.images.std(0)[..., 0]
    )
    assert [ax.get_title() for ax in counts] == ["few", "many"]
    for ax, mask in zip(counts, (few, many), strict=True):
        (image,) = ax.get_images()
        assert image.get_clim() == (0, 5)
        np.testing.assert_array_equal(image.get_array().ravel(), mask.sum(axis=1))
