"""Image datasets: one interface, in memory, in an order that a seed determines.

`load` reads a whole dataset into uint8 arrays: "digits", which scikit-learn embeds,
or any image classification dataset that `tfds` finds prepared as ArrayRecord.
`train_batches` and `eval_batches` go through a split.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

Batch = dict[str, np.ndarray]

_CROP_PADDING = 4
_SHIFTS = 2 * _CROP_PADDING + 1
_CROPS = _SHIFTS * _SHIFTS * 2  # top, left, flipped or not


@dataclasses.dataclass(frozen=True)
class Split:
    """Images uint8 [n, height, width, channels] and labels int32 [n]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Two splits; mean and deviation of the training pixels, each [channels]."""

    name: str
    train: Split
    test: Split
    num_classes: int
    mean: np.ndarray
    std: np.ndarray

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width, channels."""
        return self.train.images.shape[1:]

    def normalize(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Map uint8 images [..., channels] to float32 of mean 0 and deviation 1."""
        images = jnp.asarray(images, jnp.float32)
        mean, std = (
            jnp.expand_dims(moment, range(images.ndim - 1))
            for moment in (self.mean, self.std)
        )
        return (images - mean) / std


def load(name: str, data_dir: str | None = None) -> Dataset:
    """Read a dataset into memory; a second call for the same one is free.

    Args:
      name: "digits", or a name that `tfds.builder` takes, such as "fashion_mnist",
        "cifar10" or "cifar10:3.0.2".
      data_dir: folder of the prepared tfds datasets; by default the environment
        variable SPARSEJAX_DATA_DIR. "digits" needs none.

    Raises:
      ValueError: where the dataset is unknown, not prepared, not prepared as
        ArrayRecord, or not images of one size with one label each. The message says
        what to prepare and how.
    """
    if name == "digits":
        return _load_digits()
    data_dir = data_dir or os.environ.get("SPARSEJAX_DATA_DIR")
    if not data_dir:
        raise ValueError(
            f"Dataset {name!r} needs the folder of its tfds files: set `data_dir` or "
            "the environment variable SPARSEJAX_DATA_DIR. Only 'digits' needs none."
        )
    return _load_tfds(name, os.path.abspath(os.path.expanduser(data_dir)))


@functools.cache
def _load_digits() -> Dataset:
    """Split scikit-learn's 1,797 digits (8x8) 1,437 to 360, the same for everyone."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    # 17 grey values, 0 to 16.
    images = (pixels * 15).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = (
        Split(images[part], labels[part]) for part in np.split(order, [1437])
    )
    return _dataset("digits", train, test, 10)


@functools.cache
def _load_tfds(name: str, data_dir: str) -> Dataset:
    import tensorflow_datasets as tfds

    try:
        builder: Any = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        raise ValueError(
            f"Dataset {name!r} is neither 'digits' nor known to tfds "
            f"{tfds.__version__}, and {data_dir!r} has no folder of that name. See "
            "https://www.tensorflow.org/datasets/catalog/overview for the names."
        ) from None
    if not builder.is_prepared():
        raise ValueError(
            f"Dataset {name!r} is not prepared: no {builder.data_dir!r}.\n"
            + _how_to_prepare(name, data_dir)
        )
    missing = {"train", "test"} - set(builder.info.splits)
    if missing:
        raise ValueError(
            f"Dataset {name!r} must have the splits 'train' and 'test', got "
            f"{sorted(builder.info.splits)}."
        )
    features = dict(builder.info.features)
    shape = getattr(features.get("image"), "shape", (None,))
    num_classes = getattr(features.get("label"), "num_classes", None)
    if len(shape) != 3 or None in shape or num_classes is None:
        raise ValueError(
            f"Dataset {name!r} must have an 'image' of one size and a class 'label', "
            f"got the features {features}."
        )
    try:
        sources = builder.as_data_source(["train", "test"])
    except NotImplementedError:
        raise ValueError(
            f"Dataset {name!r} in {builder.data_dir!r} is prepared, but not as "
            f"ArrayRecord: its format is {builder.info.file_format}.\n"
            + _how_to_prepare(name, data_dir)
        ) from None
    train, test = (_decode(source, shape) for source in sources)
    return _dataset(name, train, test, num_classes)


def _how_to_prepare(name: str, data_dir: str) -> str:
    arguments = f"{name!r}, data_dir={data_dir!r}, file_format='array_record'"
    code = (
        "import tensorflow_datasets as tfds; "
        f"tfds.builder({arguments}).download_and_prepare()"
    )
    return (
        "Prepare it once, where there is TensorFlow and a network:\n"
        "  pip install tensorflow tensorflow-datasets importlib_resources\n"
        f'  python -c "{code}"\n'
        "Then set `data_dir` or SPARSEJAX_DATA_DIR to the folder that holds it."
    )


def _decode(source, shape: tuple[int, ...], chunk: int = 1000) -> Split:
    images = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for start in range(0, len(source), chunk):
        rows = range(start, min(start + chunk, len(source)))
        for row, example in zip(rows, source.__getitems__(list(rows)), strict=True):
            images[row] = example["image"]
            labels[row] = example["label"]
    return Split(images, labels)


def _dataset(name: str, train: Split, test: Split, num_classes: int) -> Dataset:
    # One histogram a channel instead of a float copy of all images.
    values = np.arange(256)
    counts = np.stack(
        [
            np.bincount(train.images[..., channel].ravel(), minlength=256)
            for channel in range(train.images.shape[-1])
        ]
    )
    weights = counts / counts.sum(axis=1, keepdims=True)
    mean = weights @ values
    std = np.sqrt(weights @ values**2 - mean**2)
    return Dataset(
        name, train, test, num_classes, mean.astype(np.float32), std.astype(np.float32)
    )


def train_batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    augment: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Iterate for ever over shuffled batches; a position can be saved and restored.

    Every epoch has its own order and goes through each example once; a batch may
    reach over into the next epoch. The sequence of examples, and how each is cropped,
    depends on the seed alone, on batch size and process count only where it is cut.
    `get_state` and `set_state` of the iterator hold the position.

    Args:
      split: where the examples come from.
      batch_size: examples in the batches of all processes together.
      seed: of the order and of the augmentation.
      augment: pad by 4 pixels, crop to the former size, flip every second image.
      process_index: which of the processes asks.
      process_count: how many share each batch.

    Returns:
      An iterator of {"image": uint8 [batch_size / process_count, height, width,
      channels], "label": int32 [batch_size / process_count]}.

    Raises:
      ValueError: where the processes cannot share a batch equally.
    """
    local_size = _local_batch_size(batch_size, process_count)
    places = np.arange(local_size) * process_count + process_index
    if augment:
        images = np.pad(split.images, [(0, 0), *[(_CROP_PADDING,) * 2] * 2, (0, 0)])
        gather = functools.partial(_gather_augmented, images, split)
    else:
        gather = functools.partial(_gather, split)
    order = _Order(len(split), seed, batch_size, places)
    batches = grain.MapDataset.source(order).map(lambda drawn: gather(*drawn))
    # The arrays are in memory: reading threads would only wait for one another.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0)))


class _Order:
    """An endless sequence of batches, as (rows, choices of a crop) [local batch] each.

    Every epoch is a permutation of all rows with a choice for each. Drawing an epoch
    at once costs little; a `grain.MapDataset.shuffle` and `random_map` of single rows
    take longer for a batch than a training step of a small network does.
    """

    def __init__(self, size: int, seed: int, batch_size: int, places: np.ndarray):
        self._size = size
        self._batch_size = batch_size
        self._places = places  # of this process in a batch

        @functools.lru_cache(maxsize=2)
        def draw(epoch: int) -> np.ndarray:  # [2, size]
            rng = np.random.default_rng((seed, epoch))
            return np.stack([rng.permutation(size), rng.integers(_CROPS, size=size)])

        self._draw = draw

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> np.ndarray:
        epochs, places = np.divmod(index * self._batch_size + self._places, self._size)
        drawn = np.empty((2, len(places)), int)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            drawn[:, inside] = self._draw(int(epoch))[:, places[inside]]
        return drawn


def _local_batch_size(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size must be a positive multiple of the {process_count} "
            f"process(es), got {batch_size}."
        )
    return batch_size // process_count


def _gather(split: Split, rows: np.ndarray, choices: np.ndarray) -> Batch:
    del choices
    return {"image": split.images[rows], "label": split.labels[rows]}


def _gather_augmented(
    padded: np.ndarray, split: Split, rows: np.ndarray, choices: np.ndarray
) -> Batch:
    tops, lefts, flips = np.unravel_index(choices, (_SHIFTS, _SHIFTS, 2))
    height, width, channels = split.images.shape[1:]
    images = np.empty((len(rows), height, width, channels), np.uint8)
    drawn = zip(rows, tops, lefts, flips, strict=True)
    for image, (row, top, left, flip) in zip(images, drawn, strict=True):
        crop = padded[row, top : top + height, left : left + width]
        image[:] = crop[:, ::-1] if flip else crop
    return {"image": images, "label": split.labels[rows]}


def eval_batches(
    split: Split, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Go through a split once, in batches of one size.

    The last batch is filled up with copies of the first example of weight 0, so that
    sums with the weights count every example exactly once. Every process gets the
    same number of batches.

    Args:
      split: where the examples come from.
      batch_size: examples in the batches of all processes together.
      process_index: which of the processes asks.
      process_count: how many share each batch.

    Yields:
      {"image": uint8 [batch_size / process_count, height, width, channels], "label":
      int32 [batch_size / process_count], "weight": float32, the same shape: 1 or 0}.

    Raises:
      ValueError: where the processes cannot share a batch equally.
    """
    local_size = _local_batch_size(batch_size, process_count)
    for start in range(0, len(split), batch_size):
        rows = np.arange(local_size) * process_count + process_index + start
        inside = rows < len(split)
        rows = np.where(inside, rows, 0)
        yield {
            "image": split.images[rows],
            "label": split.labels[rows],
            "weight": inside.astype(np.float32),
        }
