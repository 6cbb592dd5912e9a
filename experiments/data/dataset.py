"""A dataset as a training sees it: batches to train on, batches to test with."""

import dataclasses
import os
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from experiments.data import memory, sources, streaming
from experiments.data.iterator import Batches, BatchSource
from experiments.data.order import EvalSource, Examples, Share, TrainSource
from experiments.data.rand_augment import MAX_MAGNITUDE

AUGMENTATIONS = ("none", "crop", "crop_reflect", "resized_crop")
# Each holds a batch.
_MOST_THREADS = 16
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Two splits; mean and deviation of the training pixels, each [channels]."""

    config: base.Data
    train: Examples
    test: Examples
    num_classes: int
    mean: np.ndarray
    std: np.ndarray

    @property
    def name(self) -> str:
        """As in the config."""
        return self.config.name

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        return self.train.image_shape

    @property
    def num_train(self) -> int:
        """How many examples there are to train on."""
        return len(self.train)

    @property
    def num_test(self) -> int:
        """How many examples there are to test with."""
        return len(self.test)

    def normalize(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Map uint8 images [..., channels] to float32 of mean 0 and deviation 1."""
        images = jnp.asarray(images, jnp.float32)
        mean, std = (
            jnp.expand_dims(moment, range(images.ndim - 1))
            for moment in (self.mean, self.std)
        )
        return (images - mean) / std

    def train_batches(
        self,
        batch_size: int,
        *,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Batches:
        """Iterate for ever over shuffled batches; a position can be saved and restored.

        Every epoch has its own order and goes through each example once; a batch may
        reach over into the next epoch. The sequence of examples, and how each is
        augmented, depends on the seed alone, on batch size and process count only where
        it is cut. `get_state` and `set_state` of the iterator hold the position; Orbax
        saves it and restores it on any number of processes.

        Args:
          batch_size: examples in the batches of all processes together.
          seed: of the order and of the augmentation.
          process_index: which of the processes asks.
          process_count: how many share each batch, each a part of it in a row.

        Returns:
          An iterator of {"image": uint8 [batch_size / process_count, height, width,
          channels], "label": int32 [batch_size / process_count]}. With mixup or cutmix
          "label" is float32 [batch_size / process_count, num_classes], and sums to 1.

        Raises:
          ValueError: where the processes cannot share a batch equally, or, with mixup
            or cutmix, cannot pair their examples.
        """
        share = Share(batch_size, process_index, process_count)
        source = TrainSource(self.train, self.config, self.num_classes, share, seed)
        return self._iterate(source, batch_size)

    def eval_batches(
        self, batch_size: int, *, process_index: int = 0, process_count: int = 1
    ) -> Batches:
        """Go through the test split once, in batches of one size.

        The last batch is filled up with copies of the first example of weight 0, so
        that sums with the weights count every example exactly once. Every process gets
        the same number of batches.

        Args:
          batch_size: examples in the batches of all processes together.
          process_index: which of the processes asks.
          process_count: how many share each batch, each a part of it in a row.

        Returns:
          An iterator of {"image": uint8 [batch_size / process_count, height, width,
          channels], "label": int32 [batch_size / process_count], "weight": float32, the
          same shape: 1 or 0}.

        Raises:
          ValueError: where the processes cannot share a batch equally.
        """
        source = EvalSource(self.test, Share(batch_size, process_index, process_count))
        return self._iterate(source, batch_size)

    def _iterate(self, source: BatchSource, batch_size: int) -> Batches:
        # With arrays in memory, threads would only wait for one another.
        threads = min(os.cpu_count() or 1, _MOST_THREADS) if self.config.stream else 0
        workers = self.config.workers
        return Batches(source, batch_size, workers=workers, threads=threads)


def load(config: base.Data) -> Dataset:
    """Load a dataset: into memory, or open it to be streamed.

    Raises:
      ValueError: where a field of the config does not fit, or the dataset is unknown,
        not prepared, not whole, not prepared as ArrayRecord, or not images with one
        label each. The message says what to prepare and how.
    """
    _check(config)
    folder = "" if config.name == "digits" else sources.folder_of(config)
    kind = streaming if config.stream else memory
    train, test, num_classes = kind.load(config, folder)
    return Dataset(config, train, test, num_classes, *_moments(config, train))


def _moments(config: base.Data, train: Examples) -> list[np.ndarray]:
    """Return mean and deviation of pixels in [0, 255], each float32 [channels]."""
    channels = train.image_shape[-1]
    if config.mean:
        if len(config.mean) not in (1, channels):
            _refuse("mean", f"() or 1 or {channels} numbers", config.mean)
        moments = np.multiply([config.mean, config.std], 255)
    elif isinstance(train, memory.Split):
        moments = memory.moments(train.images)
    elif channels == 3:
        moments = np.multiply([_IMAGENET_MEAN, _IMAGENET_STD], 255)
    else:
        _refuse("mean", f"{channels} numbers for streamed grey images", config.mean)
    return [np.broadcast_to(x, channels).astype(np.float32) for x in moments]


def _check(config: base.Data) -> None:
    if config.augment not in AUGMENTATIONS:
        _refuse("augment", f"one of {AUGMENTATIONS}", config.augment)
    for name in ("workers", "image_size", "padding", "rand_augment", "mixup", "cutmix"):
        if getattr(config, name) < 0:
            _refuse(name, "at least 0", getattr(config, name))
    if not 0 <= config.magnitude <= MAX_MAGNITUDE:
        _refuse("magnitude", f"0 to {MAX_MAGNITUDE}", config.magnitude)
    if len(config.mean) != len(config.std) or not all(x > 0 for x in config.std):
        _refuse("std", "as many positive numbers as `data.mean` has", config.std)
    if config.stream and config.name == "digits":
        _refuse("stream", "False for 'digits', which are in memory", config.stream)
    if not config.stream and (config.workers or config.image_size):
        _refuse("stream", "True where workers or image_size are set", config.stream)


def _refuse(field: str, required: str, got: Any) -> NoReturn:
    raise ValueError(f"data.{field} must be {required}, got {got!r}.")
