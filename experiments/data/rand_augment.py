"""RandAugment (Cubuk et al. 2020): a few operations at random, all equally strong.

Operations, their ranges and the scale of 31 magnitudes are those of torchvision's
`RandAugment`, done by PIL. Of the libraries that need neither TensorFlow nor PyTorch,
`dm_pix` and `augmax` have some of the operations and not the policy.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from experiments.data.augment import to_array, to_image

MAX_MAGNITUDE = 30
_NEAREST = Image.Resampling.NEAREST

Operation = Callable[[Image.Image, float], Image.Image]


def _affine(image: Image.Image, *coefficients: float) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, coefficients, resample=_NEAREST
    )


def _enhance(kind: Callable) -> Operation:
    return lambda image, level: kind(image).enhance(1 + level)


# By name: the operation, its level at the largest magnitude, and whether the level may
# be negative. Shears and shifts leave what they uncover black.
_OPERATIONS: dict[str, tuple[Operation, float, bool]] = {
    "identity": (lambda image, level: image, 0.0, False),
    "shear_x": (lambda i, v: _affine(i, 1, v, 0, 0, 1, 0), 0.3, True),
    "shear_y": (lambda i, v: _affine(i, 1, 0, 0, v, 1, 0), 0.3, True),
    # Of the side of the image.
    "translate_x": (
        lambda i, v: _affine(i, 1, 0, -int(v * i.width), 0, 1, 0),
        150 / 331,
        True,
    ),
    "translate_y": (
        lambda i, v: _affine(i, 1, 0, 0, 0, 1, -int(v * i.height)),
        150 / 331,
        True,
    ),
    "rotate": (lambda i, v: i.rotate(v, resample=_NEAREST), 30.0, True),
    "brightness": (_enhance(ImageEnhance.Brightness), 0.9, True),
    "color": (_enhance(ImageEnhance.Color), 0.9, True),
    "contrast": (_enhance(ImageEnhance.Contrast), 0.9, True),
    "sharpness": (_enhance(ImageEnhance.Sharpness), 0.9, True),
    # Bits that are lost, and how far the threshold goes down from white.
    "posterize": (lambda i, v: ImageOps.posterize(i, 8 - round(v)), 4.0, False),
    "solarize": (lambda i, v: ImageOps.solarize(i, int(255 - v)), 255.0, False),
    "autocontrast": (lambda image, level: ImageOps.autocontrast(image), 0.0, False),
    "equalize": (lambda image, level: ImageOps.equalize(image), 0.0, False),
}
NAMES = tuple(_OPERATIONS)


def apply(
    image: Image.Image, name: str, magnitude: int, negative: bool = False
) -> Image.Image:
    """Apply one operation to an image ("RGB" or "L").

    Args:
      image: of any size, which it keeps.
      name: one of `NAMES`.
      magnitude: 0 to 30.
      negative: to the other side, where the operation has two.
    """
    operation, most, signed = _OPERATIONS[name]
    level = most * magnitude / MAX_MAGNITUDE
    return operation(image, -level if signed and negative else level)


def rand_augment(
    pixels: np.ndarray, rng: np.random.Generator, operations: int, magnitude: int
) -> np.ndarray:
    """Apply operations, drawn with replacement, to uint8 [height, width, channels].

    Args:
      pixels: of one image.
      rng: draws the operations.
      operations: how many.
      magnitude: of each, 0 to 30.
    """
    image = to_image(pixels)
    for _ in range(operations):
        name = NAMES[rng.integers(len(NAMES))]
        image = apply(image, name, magnitude, negative=bool(rng.integers(2)))
    return to_array(image)
