import io
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from experiments.data import augment, mixing, rand_augment

BOXES = 2000


def pixels(height, width, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parametrize("reflect", [False, True])
def test_padded_crops_of_all_keys(reflect):
    """Keys in a row go through all places, each flipped or not."""
    images = pixels(7, 6)[None].repeat(2 * 5 * 5, axis=0)
    found = augment.pad_and_crop(images, np.arange(50), 2, reflect=reflect)
    assert found.shape == images.shape
    assert len({image.tobytes() for image in found}) == 50
    for key, (top, left, flip) in enumerate(
        itertools.product(range(5), range(5), (0, 1))
    ):
        expected = np.zeros((7, 6, 3))
        for row, column in itertools.product(range(7), range(6)):
            y, x = row + top - 2, column + left - 2
            inside = 0 <= y < 7 and 0 <= x < 6
            if reflect:  # the edge itself is not repeated
                y, x = (6 - abs(6 - abs(y))), (5 - abs(5 - abs(x)))
            if inside or reflect:
                expected[row, 5 - column if flip else column] = images[0, y, x]
        np.testing.assert_array_equal(found[key], expected)
    # A key is taken modulo the number of choices.
    again = augment.pad_and_crop(
        images[:1], np.array([50 * 10**15 + 7]), 2, reflect=reflect
    )
    np.testing.assert_array_equal(again[0], found[7])


@hypothesis.given(st.integers(1, 2000), st.integers(1, 2000), st.integers(0, 2**63 - 1))
def test_boxes_lie_inside(width, height, seed):
    box = augment.draw_box(np.random.default_rng(seed), width, height)
    assert 0 <= box.left <= box.left + box.width <= width
    assert 0 <= box.top <= box.top + box.height <= height
    assert box.width > 0 and box.height > 0


def test_boxes_have_the_areas_and_ratios_of_the_paper():
    rng = np.random.default_rng(0)
    boxes = np.array([augment.draw_box(rng, 500, 500) for _ in range(BOXES)], float)
    lefts, tops, widths, heights = boxes.T
    areas, ratios = widths * heights / 500**2, np.log(widths / heights)
    assert 0.079 < areas.min() < 0.1 and 0.93 < areas.max() <= 1
    assert np.abs(ratios).max() < math.log(4 / 3) + 0.02
    # Uniform but for the largest, of which some stick out and are drawn again.
    small = areas[areas < 0.5]
    density, _ = np.histogram(small, bins=6, range=(0.08, 0.5))
    expected = len(small) / 6
    assert np.abs(density - expected).max() < 5 * math.sqrt(expected)
    assert abs(np.median(ratios)) < 0.03
    # The place is uniform in what room there is.
    room = 500 - widths > 50
    for starts, sides in ((lefts, widths), (tops, heights)):
        relative = starts[room] / np.maximum(500 - sides[room], 1)
        assert abs(relative.mean() - 0.5) < 0.03


@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 2), (48, 0, 3, 2)), ((2, 100), (0, 48, 2, 3)), ((1, 1), (0, 0, 1, 1))],
)
def test_long_images_give_their_middle(size, expected):
    class Never:
        """Draws the whole area, which does not fit a long image."""

        def uniform(self, low, high):
            return high

        def integers(self, high):
            return 0

    assert augment.draw_box(Never(), *size) == expected  # type: ignore[arg-type]


def test_a_resized_crop_is_the_part_resized():
    image = Image.fromarray(pixels(40, 60))
    box = augment.Box(left=10, top=5, width=20, height=30)
    found = augment.resized_crop(image, box, 16, 12, "RGB")
    part = image.crop((10, 5, 30, 35))
    expected = part.resize((12, 16), Image.Resampling.BILINEAR)
    difference = np.asarray(found, int) - np.asarray(expected, int)
    # At the edge, PIL's filter sees the neighbours of the part too.
    assert np.abs(difference)[1:-1, 1:-1].max() <= 1
    assert np.abs(difference).mean() < 2


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(("side", "width"), [(150, 1200), (200, 600), (440, 300)])
def test_a_jpeg_is_decoded_no_larger_than_needed(mode, side, width):
    coarse = Image.fromarray(pixels(6, 9)).convert(mode)
    whole = coarse.resize((1200, 800), Image.Resampling.BICUBIC)
    whole.save(file := io.BytesIO(), "JPEG", quality=95)
    box = augment.Box(left=101, top=53, width=side, height=side + 9)

    opened, decoded = Image.open(file), Image.open(file)
    found = augment.resized_crop(opened, box, 100, 100, "RGB")
    assert opened.width == width
    decoded.load()
    expected = augment.resized_crop(decoded, box, 100, 100, "RGB")
    assert decoded.width == 1200
    difference = np.asarray(found, float) - np.asarray(expected, float)
    assert np.abs(difference).mean() < 2


def test_a_random_resized_crop_is_drawn_by_its_key():
    image = Image.fromarray(pixels(40, 60))
    crop = lambda key: augment.random_resized_crop(image, key, 8, 6, "RGB")
    crops = [crop(key) for key in range(100)]
    assert all(found.shape == (8, 6, 3) for found in crops)
    flipped = 0
    for key, found in enumerate(crops):
        np.testing.assert_array_equal(found, crop(key))
        box = augment.draw_box(np.random.default_rng(key), 60, 40)
        expected = np.asarray(augment.resized_crop(image, box, 8, 6, "RGB"))
        flip = (found != expected).any()
        np.testing.assert_array_equal(found[:, ::-1] if flip else found, expected)
        flipped += flip
    assert 30 < flipped < 70


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (33, 33)])
def test_the_central_crop_is_in_the_middle(size):
    width, height = size
    ramp = np.stack(np.broadcast_arrays(*np.ogrid[:height, :width]), axis=-1)
    channels = np.dstack([ramp, np.zeros((height, width))])
    image = Image.fromarray(channels.astype(np.uint8))
    found = np.asarray(augment.central_crop(image, 16, "RGB"), float)
    side = min(size) * 7 / 8
    # In the middle of a pixel of the crop lies this pixel of the image.
    places = (np.arange(16) + 0.5) * side / 16 - 0.5
    rows, columns = places + (height - side) / 2, places + (width - side) / 2
    np.testing.assert_allclose(found[..., 0], np.tile(rows[:, None], (1, 16)), atol=0.8)
    np.testing.assert_allclose(found[..., 1], np.tile(columns, (16, 1)), atol=0.8)


def test_randaugment_operations_on_given_magnitudes():
    image = pixels(12, 10)
    apply = lambda *args, **kwargs: np.asarray(
        rand_augment.apply(Image.fromarray(image), *args, **kwargs), int
    )
    np.testing.assert_array_equal(apply("identity", 30), image)
    # Six bits are kept at half, four at full magnitude.
    np.testing.assert_array_equal(apply("posterize", 15), image & 0b11111100)
    np.testing.assert_array_equal(apply("posterize", 30), image & 0b11110000)
    threshold = 255 - 255 * 9 / 30
    inverted = np.where(image < int(threshold), image, 255 - image)
    np.testing.assert_array_equal(apply("solarize", 9), inverted)
    for negative, factor in ((False, 1.27), (True, 0.73)):
        brighter = np.minimum(image * factor, 255)
        found = apply("brightness", 9, negative=negative)
        np.testing.assert_allclose(found, brighter, atol=1)
        grey = np.asarray(Image.fromarray(image).convert("L"), float)[..., None]
        coloured = (grey + factor * (image - grey)).clip(0, 255)
        np.testing.assert_allclose(
            apply("color", 9, negative=negative), coloured, atol=1
        )
        contrast = (round(grey.mean()) * (1 - factor) + factor * image).clip(0, 255)
        found = apply("contrast", 9, negative=negative)
        np.testing.assert_allclose(found, contrast, atol=2)
    # 4 of 10 pixels at magnitude 27: 27 / 30 x 150 / 331 x 10 = 4.08
    shifted = np.zeros_like(image)
    shifted[:, 4:] = image[:, :-4]
    np.testing.assert_array_equal(apply("translate_x", 27), shifted)
    shifted = np.zeros_like(image)
    shifted[:-4] = image[4:]
    np.testing.assert_array_equal(apply("translate_y", 27, negative=True), shifted)
    row, level = 9, 0.3 * 20 / 30
    sheared = apply("shear_x", 20)
    np.testing.assert_array_equal(sheared[0], image[0])
    shift = int((row + 0.5) * level + 0.5)
    np.testing.assert_array_equal(sheared[row, : 10 - shift], image[row, shift:])
    assert (sheared[row, 10 - shift :] == 0).all()
    square = pixels(9, 9, seed=1)
    turned = rand_augment.apply(Image.fromarray(square), "rotate", 30)
    np.testing.assert_array_equal(np.asarray(turned)[4, 4], square[4, 4])
    assert (np.asarray(turned)[0, 0] == 0).all()
    stretched = apply("autocontrast", 0)
    assert stretched.min() == 0 and stretched.max() == 255
    dark = pixels(60, 60) // 4
    equalized = rand_augment.apply(Image.fromarray(dark), "equalize", 0)
    assert np.asarray(equalized).std() > 2 * dark.std()


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_draws_every_operation(channels):
    image, rng = pixels(8, 8, channels), np.random.default_rng(0)
    names = []
    apply = rand_augment.apply

    def recorded(image, name, magnitude, negative):
        names.append((name, negative))
        assert magnitude == 9
        return apply(image, name, magnitude, negative)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rand_augment, "apply", recorded)
        for _ in range(300):
            found = rand_augment.rand_augment(image, rng, 2, 9)
            assert (found.shape, found.dtype) == (image.shape, np.uint8)
    assert len(names) == 600
    assert set(names) == {(n, s) for n in rand_augment.NAMES for s in (False, True)}
    assert len(rand_augment.NAMES) == 14
    np.testing.assert_array_equal(rand_augment.rand_augment(image, rng, 0, 9), image)


def one_pair(cut, share, y=0.5, x=0.5):
    return mixing.Pairs(*(np.array([value]) for value in (cut, share, y, x)))


def test_mixup_is_the_weighted_mean():
    images, labels = np.stack([pixels(4, 5), pixels(4, 5, seed=1)]), np.array([2, 0])
    mixed, classes = mixing.mix(images, labels, 3, one_pair(False, 0.7))
    first, second = images.astype(float)
    expected = np.stack([0.7 * first + 0.3 * second, 0.3 * first + 0.7 * second])
    np.testing.assert_allclose(mixed, expected, atol=0.51)
    assert (mixed.dtype, classes.dtype) == (np.uint8, np.float32)
    np.testing.assert_allclose(classes, [[0.3, 0, 0.7], [0.7, 0, 0.3]], atol=1e-6)


def test_cutmix_swaps_a_box_and_counts_its_pixels():
    images = np.stack([np.zeros((8, 10, 3)), np.ones((8, 10, 3))]).astype(np.uint8)
    # Half of each side: 4 of 8 and 5 of 10 pixels.
    mixed, classes = mixing.mix(images, np.array([0, 1]), 2, one_pair(True, 0.75))
    expected = np.zeros((8, 10, 3))
    expected[2:6, 3:8] = 1
    np.testing.assert_array_equal(mixed[0], expected)
    np.testing.assert_array_equal(mixed[1], 1 - expected)
    np.testing.assert_allclose(classes, [[0.75, 0.25], [0.25, 0.75]])
    # At the corner a quarter of the box is inside.
    mixed, classes = mixing.mix(
        images, np.array([0, 1]), 2, one_pair(True, 0.75, 0.0, 0.999)
    )
    assert mixed[0].sum() == mixed[0, :2, 7:].sum() > 0
    np.testing.assert_allclose(classes[0, 1], mixed[0].mean(), rtol=1e-6)


@hypothesis.given(
    st.integers(0, 2**32), st.sampled_from([(0.2, 0), (0, 1), (0.2, 1.0)])
)
def test_labels_tell_what_images_are_made_of(seed, alphas):
    """Images of one value tell by their mean how much of each is in them."""
    rng = np.random.default_rng(seed)
    images = np.zeros((6, 7, 9, 1), np.uint8)
    images[1::2] = 200
    pairs = mixing.draw(rng, 3, *alphas)
    assert (pairs.share >= 0).all() and (pairs.share <= 1).all()
    mixed, classes = mixing.mix(images, np.arange(6), 6, pairs)
    np.testing.assert_allclose(classes.sum(axis=1), 1, atol=1e-6)
    of_second = classes[:, 1::2].sum(axis=1)
    np.testing.assert_allclose(mixed.mean(axis=(1, 2, 3)), 200 * of_second, atol=0.51)
    # Nothing goes beyond a pair.
    between = classes.reshape(3, 2, 3, 2).sum(axis=(1, 3))
    np.testing.assert_allclose(between, 2 * np.eye(3), atol=1e-6)


def test_what_is_drawn_for_pairs():
    pairs = mixing.draw(np.random.default_rng(0), 4000, 0.2, 1.0)
    assert 0.47 < pairs.cut.mean() < 0.53
    # Beta(a, a) has the variance 1 / (4 (2a + 1)): uniform for cutmix.
    for cut, alpha in ((True, 1.0), (False, 0.2)):
        share = pairs.share[pairs.cut == cut]
        assert abs(share.mean() - 0.5) < 0.03
        assert share.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)
    assert not mixing.draw(np.random.default_rng(0), 50, 0.2, 0.0).cut.any()
    assert mixing.draw(np.random.default_rng(0), 50, 0.0, 1.0).cut.all()
