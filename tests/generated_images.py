"""JPEG files of all sizes and kinds that ImageNet has, and a dataset of them."""

import contextlib
import io
import pathlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
from PIL import Image

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


@contextlib.contextmanager
def mocked(data_dir: str | pathlib.Path) -> Iterator[None]:
    """Let tfds make up six examples a split of what is prepared in a folder."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.features import image_feature

    encoder = image_feature._ImageEncoder
    policy = tfds.testing.MockPolicy.USE_FILES
    made_up = tfds.testing.mock_data(
        num_examples=6, data_dir=str(data_dir), policy=policy
    )
    with mock.patch.object(encoder, "_encode_image", _encode), made_up:
        yield


def _encode(self, pixels: np.ndarray) -> bytes:
    """Encode as tfds does, which asks TensorFlow."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, self.encoding_format)
    return file.getvalue()
