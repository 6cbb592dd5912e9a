"""Splits whose images are decoded when they are needed: ImageNet and the like."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from configs import base
from experiments.data import augment
from experiments.data.iterator import Batch
from experiments.data.sources import Source, open_splits


@dataclasses.dataclass(frozen=True)
class Stream:
    """The encoded images of a split; can go to a worker process.

    `image_size` is the height and width that they get; 0: they are of one size, and
    keep it.
    """

    source: Source
    image_size: int

    def __len__(self) -> int:
        return len(self.source)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        height, width, channels = self.source.shape
        if self.image_size:
            return self.image_size, self.image_size, channels
        assert height is not None and width is not None
        return height, width, channels

    @property
    def images(self) -> np.ndarray:
        """All images as evaluation sees them: for a split that is small after all."""
        return self.read(np.arange(len(self)))["image"]

    @property
    def labels(self) -> np.ndarray:
        """All labels, int32 [n]."""
        rows = range(len(self))
        return np.array([self.source[row][1] for row in rows], np.int32)

    def read(self, rows: np.ndarray) -> Batch:
        """Return examples: whole, or their centre where they get another size.

        Raises:
          ValueError: where an image is damaged.
        """
        return self._batch(rows, [self._centre] * len(rows))

    def read_resized_crops(self, rows: np.ndarray, keys: np.ndarray) -> Batch:
        """Return random parts of examples, each resized.

        Raises:
          ValueError: where an image is damaged.
        """
        height, width, _ = self.image_shape
        shape = {"height": height, "width": width, "mode": self.source.mode}
        crop = augment.random_resized_crop
        return self._batch(
            rows, [functools.partial(crop, key=key, **shape) for key in keys.tolist()]
        )

    def _centre(self, image: Image.Image) -> np.ndarray:
        mode, size = self.source.mode, self.image_size
        if size:
            return augment.to_array(augment.central_crop(image, size, mode))
        return augment.to_array(augment.as_mode(image, mode))

    def _batch(
        self, rows: np.ndarray, decode: Sequence[Callable[[Image.Image], np.ndarray]]
    ) -> Batch:
        images = np.empty((len(rows), *self.image_shape), np.uint8)
        labels = np.empty(len(rows), np.int32)
        for place, row in enumerate(rows.tolist()):
            image, labels[place] = self.source[row]
            try:
                images[place] = decode[place](image)
            except (OSError, ValueError) as error:
                raise self.source.damaged(row, error) from error
        return {"image": images, "label": labels}


def load(config: base.Data, folder: str) -> tuple[Stream, Stream, int]:
    """Open the training and the test split.

    Returns:
      Both splits and the number of classes.

    Raises:
      ValueError: as `sources.open_splits`, and where images are of several sizes and
        the config does not say which one they get.
    """
    train, test = open_splits(
        config.name, folder, (config.train_split, config.test_split)
    )
    if None in train.shape and not config.image_size:
        raise ValueError(
            f"Dataset {config.name!r} has images of several sizes, {train.shape}: set "
            "`data.image_size`."
        )
    size = config.image_size
    return Stream(train, size), Stream(test, size), train.num_classes
