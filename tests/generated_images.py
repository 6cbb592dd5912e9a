"""JPEG files of all sizes and kinds that ImageNet has, and a dataset of them."""

import pathlib

import numpy as np

from benchmarks.photographs import photograph
from experiments.data import prepare

# Height and width: usual ones, large, long, and smaller than any crop.
SIZES = [(375, 500), (500, 375), (333, 500), (768, 1024), (90, 640), (61, 40), (9, 7)]
# ImageNet has grey and CMYK ones among its RGB.
MODES = ["RGB", "RGB", "L", "RGB", "CMYK"]


def write_files(folder: pathlib.Path, counts: dict[str, int], classes: int) -> None:
    """Write so many JPEG files a split into SPLIT/CLASS/, the classes in turn."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for number in range(count):
            of_class = folder / split / f"class{number % classes}"
            of_class.mkdir(parents=True, exist_ok=True)
            image = photograph(rng, *SIZES[number % len(SIZES)])
            image = image.convert(MODES[number % len(MODES)])
            image.save(of_class / f"{number:04}.JPEG", quality=85)


def imagenet(
    folder: pathlib.Path, train: int = 20, validation: int = 7, classes: int = 5
) -> pathlib.Path:
    """Prepare generated images as tfds prepares imagenet2012.

    Returns:
      What `data_dir` must be.
    """
    write_files(folder / "files", {"train": train, "validation": validation}, classes)
    # The version that tfds asks for.
    prepare.from_folder(folder / "files", "imagenet2012", folder / "tfds", "5.1.0")
    return folder / "tfds"
