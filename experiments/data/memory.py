"""Splits that are held in memory, decoded once: small images, many thousands."""

import dataclasses
import functools

import numpy as np

from configs import base
from experiments.data import augment
from experiments.data.iterator import Batch
from experiments.data.sources import Source, digits, open_splits


@dataclasses.dataclass(frozen=True)
class Split:
    """Images uint8 [n, height, width, channels] and labels int32 [n]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        _, height, width, channels = self.images.shape
        return height, width, channels

    def read(self, rows: np.ndarray) -> Batch:
        """Return examples as they are."""
        return {"image": self.images[rows], "label": self.labels[rows]}

    def read_resized_crops(self, rows: np.ndarray, keys: np.ndarray) -> Batch:
        """Return random parts of examples, each resized to the whole."""
        height, width, channels = self.image_shape
        images = np.empty((len(rows), height, width, channels), np.uint8)
        for place, (row, key) in enumerate(zip(rows, keys, strict=True)):
            image = augment.to_image(self.images[row])
            images[place] = augment.random_resized_crop(
                image, key, height, width, image.mode
            )
        return {"image": images, "label": self.labels[rows]}


def load(config: base.Data, folder: str) -> tuple[Split, Split, int]:
    """Read the training and the test split into memory; the second time is free.

    Returns:
      Both splits and the number of classes.

    Raises:
      ValueError: as `sources.open_splits`, and where images are of several sizes.
    """
    splits = config.train_split, config.test_split
    if config.name == "digits":
        unknown = set(splits) - set(digits())
        if unknown:
            raise ValueError(
                f"Dataset 'digits' has the splits {list(digits())}, got {unknown}."
            )
        train, test, num_classes = *(digits()[split] for split in splits), 10
    else:
        train, test, num_classes = _decoded(config.name, folder, splits)
    return Split(*train), Split(*test), num_classes


@functools.cache
def _decoded(name: str, folder: str, splits: tuple[str, str]):
    train, test = open_splits(name, folder, splits)
    if None in train.shape:
        raise ValueError(
            f"Dataset {name!r} has images of several sizes, {train.shape}, which one "
            "array cannot hold: set `data.stream=True` and `data.image_size`."
        )
    return _decode(train), _decode(test), train.num_classes


def _decode(source: Source) -> tuple[np.ndarray, np.ndarray]:
    images = np.empty((len(source), *source.shape), np.uint8)  # type: ignore[arg-type]
    labels = np.empty(len(source), np.int32)
    for row in range(len(source)):
        image, labels[row] = source[row]
        try:
            images[row] = augment.to_array(augment.as_mode(image, source.mode))
        except (OSError, ValueError) as error:
            raise source.damaged(row, error) from error
    return images, labels


def moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and deviation of the channels of uint8 images, each [channels]."""
    # One histogram a channel instead of a float copy of all images.
    values = np.arange(256)
    counts = np.stack(
        [
            np.bincount(images[..., channel].ravel(), minlength=256)
            for channel in range(images.shape[-1])
        ]
    )
    weights = counts / counts.sum(axis=1, keepdims=True)
    mean = weights @ values
    return mean, np.sqrt(weights @ values**2 - mean**2)
