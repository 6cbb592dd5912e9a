"""Which examples a batch has, and what chance does to them.

The order of examples, and a random key for each of them, depend on the seed alone.
Batches and processes only cut the sequence.
"""

import dataclasses
import functools
import sys
from typing import Protocol

import numpy as np

from configs import base
from experiments.data import augment, mixing
from experiments.data.iterator import Batch
from experiments.data.rand_augment import rand_augment


class Examples(Protocol):
    """One split: `memory.Split` or `streaming.Stream`."""

    def __len__(self) -> int: ...

    @property
    def images(self) -> np.ndarray: ...

    @property
    def labels(self) -> np.ndarray: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    def read(self, rows: np.ndarray) -> Batch: ...

    def read_resized_crops(self, rows: np.ndarray, keys: np.ndarray) -> Batch: ...


@dataclasses.dataclass(frozen=True)
class Share:
    """What one of several processes has of every batch: a part of it in a row.

    Raises:
      ValueError: where the processes cannot share a batch equally.
    """

    batch_size: int
    process_index: int
    process_count: int

    def __post_init__(self):
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise ValueError(
                f"batch_size must be a positive multiple of the {self.process_count} "
                f"process(es), got {self.batch_size}."
            )
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"process_index must be in [0, {self.process_count}), got "
                f"{self.process_index}."
            )

    def places(self, index: int) -> np.ndarray:
        """Return which of all examples in a row it has in a batch, int64 [local]."""
        local_size = self.batch_size // self.process_count
        start = index * self.batch_size + self.process_index * local_size
        return np.arange(start, start + local_size)


class Order:
    """An endless sequence of examples: every epoch has each once, in its own order.

    With each example comes a key, a random number that decides how the example is
    augmented. Both depend on the seed, the epoch and the place in the epoch alone.
    """

    def __init__(self, size: int, seed: int):
        self._size = size
        self._seed = seed
        # An epoch drawn at once costs little. Two: a batch may reach into the next.
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)

    def __reduce__(self):
        return type(self), (self._size, self._seed)

    def __getitem__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and keys, both int64 [n], of the n-th examples ever seen [n]."""
        epochs, places = np.divmod(places, self._size)
        drawn = np.empty((2, len(places)), np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            drawn[:, inside] = self._epoch(int(epoch))[:, places[inside]]
        return drawn[0], drawn[1]

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self._seed, epoch))
        return np.stack(
            [rng.permutation(self._size), rng.integers(2**63, size=self._size)]
        )


class TrainSource:
    """All batches of a training, each a function of its number."""

    def __init__(
        self,
        examples: Examples,
        config: base.Data,
        num_classes: int,
        share: Share,
        seed: int,
    ):
        self._examples = examples
        self._num_classes = num_classes
        self._config = config
        self._mixes = config.mixup > 0 or config.cutmix > 0
        if self._mixes and share.batch_size // share.process_count % 2:
            raise ValueError(
                "mixup and cutmix mix pairs: batch_size must be a multiple of two for "
                f"each of the {share.process_count} process(es), got "
                f"{share.batch_size}."
            )
        self._order = Order(len(examples), seed)
        self._seed = seed
        self._share = share

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Batch:
        batch = self._augmented(*self._order[self._share.places(index)])
        return self._mixed(index, batch) if self._mixes else batch

    def _augmented(self, rows: np.ndarray, keys: np.ndarray) -> Batch:
        config = self._config
        if config.augment == "resized_crop":
            batch = self._examples.read_resized_crops(rows, keys)
        else:
            batch = self._examples.read(rows)
        images = batch["image"]
        if config.augment in ("crop", "crop_reflect"):
            images = augment.pad_and_crop(
                images, keys, config.padding, reflect=config.augment == "crop_reflect"
            )
        if config.rand_augment:
            for image, key in zip(images, keys, strict=True):
                # Another generator than that of the crop.
                rng = np.random.default_rng((key, 1))
                image[:] = rand_augment(
                    image, rng, config.rand_augment, config.magnitude
                )
        return {"image": images, "label": batch["label"]}

    def _mixed(self, index: int, batch: Batch) -> Batch:
        config, share = self._config, self._share
        # Another generator than those of the epochs.
        rng = np.random.default_rng((self._seed, index, 1))
        pairs = mixing.draw(rng, share.batch_size // 2, config.mixup, config.cutmix)
        images, labels = mixing.mix(
            batch["image"],
            batch["label"],
            self._num_classes,
            pairs.part(share.process_index, share.process_count),
        )
        return {"image": images, "label": labels}


class EvalSource:
    """The batches of an evaluation."""

    def __init__(self, examples: Examples, share: Share):
        self._examples = examples
        self._share = share

    def __len__(self) -> int:
        return -(-len(self._examples) // self._share.batch_size)

    def __getitem__(self, index: int) -> Batch:
        rows = self._share.places(index)
        inside = rows < len(self._examples)
        batch = self._examples.read(np.where(inside, rows, 0))
        return {**batch, "weight": inside.astype(np.float32)}
