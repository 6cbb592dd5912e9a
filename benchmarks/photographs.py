"""Photographs that are none: JPEG files of the sizes that ImageNet's have."""

import pathlib

import numpy as np
from PIL import Image

# Height and width, and how often: about those of ImageNet, most of 100 kB.
SIZES = [(375, 500), (500, 375), (333, 500), (300, 400), (480, 640), (768, 1024)]
SHARES = [0.45, 0.15, 0.15, 0.1, 0.1, 0.05]


def photograph(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Return smooth shapes with a grain, which compress as photographs do."""
    coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 8, (height, width, 1))
    return Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8))


def write(folder: pathlib.Path, count: int, classes: int = 10) -> None:
    """Write so many JPEG files into CLASS/ folders, the same for everyone."""
    rng = np.random.default_rng(0)
    for number in range(count):
        of_class = folder / f"class{number % classes}"
        of_class.mkdir(parents=True, exist_ok=True)
        image = photograph(rng, *SIZES[rng.choice(len(SIZES), p=SHARES)])
        image.save(of_class / f"{number:05}.JPEG", quality=90)
