"""What training does to an image, as pure functions of what has been drawn.

Crop with padding and flip (He et al. 2016, section 4.2), the random resized crop of
Szegedy et al. 2015 (section 6), and the central crop with which both are tested.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

# Of the area, and of width over height.
_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)
_ATTEMPTS = 10
# The part of the side of a test image that remains: 224 of 256.
_CENTRAL = 224 / 256
_BILINEAR = Image.Resampling.BILINEAR


class Box(NamedTuple):
    """A part of an image, in pixels."""

    left: int
    top: int
    width: int
    height: int


def pad_and_crop(
    images: np.ndarray, keys: np.ndarray, padding: int, *, reflect: bool
) -> np.ndarray:
    """Pad images on four sides, cut their size out again, and flip every second one.

    Args:
      images: uint8 [n, height, width, channels].
      keys: random integers [n] of at least 0, which say where and whether.
      padding: of every side, in pixels.
      reflect: pad by the mirrored image without its edge, and not by zeros.
    """
    _, height, width, _ = images.shape
    widths = [(0, 0), (padding, padding), (padding, padding), (0, 0)]
    padded = np.pad(images, widths, "reflect" if reflect else "constant")
    shifts = 2 * padding + 1
    drawn = np.unravel_index(keys % (shifts * shifts * 2), (shifts, shifts, 2))
    cropped = np.empty_like(images)
    for place, (top, left, flip) in enumerate(zip(*drawn, strict=True)):
        crop = padded[place, top : top + height, left : left + width]
        cropped[place] = crop[:, ::-1] if flip else crop
    return cropped


def random_resized_crop(
    image: Image.Image, key: int, height: int, width: int, mode: str
) -> np.ndarray:
    """Resize a random part of an image, and flip every second one.

    Args:
      image: opened by PIL.
      key: a random integer of at least 0, which says which part and whether.
      height: of the result.
      width: of the result.
      mode: "RGB" or "L" of the result.

    Returns:
      Pixels, uint8 [height, width, channels].
    """
    rng = np.random.default_rng(key)
    box = draw_box(rng, *image.size)
    pixels = to_array(resized_crop(image, box, height, width, mode))
    return pixels[:, ::-1] if rng.integers(2) else pixels


def draw_box(rng: np.random.Generator, width: int, height: int) -> Box:
    """Draw the part of an image that a random resized crop takes.

    Its area is uniform in [0.08, 1] of the image's, its width over height log-uniform
    in [3/4, 4/3]. Where ten of them stick out, it is the central part with the ratio
    that is nearest.
    """
    for _ in range(_ATTEMPTS):
        area = width * height * rng.uniform(*_AREA)
        ratio = math.exp(rng.uniform(*np.log(_RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return Box(int(left), int(top), w, h)
    ratio = min(max(width / height, _RATIO[0]), _RATIO[1])
    w = min(width, round(height * ratio))
    h = min(height, round(width / ratio))
    return Box((width - w) // 2, (height - h) // 2, w, h)


def resized_crop(
    image: Image.Image, box: Box, height: int, width: int, mode: str
) -> Image.Image:
    """Return a part of an image, resized bilinearly with antialiasing.

    A JPEG that is not decoded yet is decoded at 1/2, 1/4 or 1/8 of its size where the
    part is still as large as the result.
    """
    whole_width, whole_height = image.size
    scale = min(box.width / width, box.height / height)
    image.draft(None, (math.ceil(whole_width / scale), math.ceil(whole_height / scale)))
    x, y = image.width / whole_width, image.height / whole_height
    part = (
        box.left * x,
        box.top * y,
        min((box.left + box.width) * x, image.width),
        min((box.top + box.height) * y, image.height),
    )
    return as_mode(image, mode).resize((width, height), _BILINEAR, box=part)


def central_crop(image: Image.Image, size: int, mode: str) -> Image.Image:
    """Resize the shorter side to 8/7 of `size` and return the square in the middle."""
    width, height = image.size
    side = min(width, height) * _CENTRAL
    left, top = (width - side) / 2, (height - side) / 2
    part = (left, top, left + side, top + side)
    return as_mode(image, mode).resize((size, size), _BILINEAR, box=part)


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """Return an image in a mode, without a copy where it has it."""
    return image if image.mode == mode else image.convert(mode)


def to_array(image: Image.Image) -> np.ndarray:
    """Return the pixels of an image, uint8 [height, width, channels]."""
    return np.asarray(image).reshape(image.height, image.width, -1)


def to_image(pixels: np.ndarray) -> Image.Image:
    """Return the image of pixels uint8 [height, width, channels], 1 or 3 channels."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
