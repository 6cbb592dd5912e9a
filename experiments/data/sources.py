"""Where images come from: scikit-learn's digits, and what tfds has prepared.

A prepared dataset is read without TensorFlow and undecoded: `Source` hands out the
bytes of an image as they are stored, for whoever needs it to decode as it likes.
"""

import dataclasses
import functools
import io
import os
from typing import Any

import numpy as np
from PIL import Image

from configs import base

_MODES = {1: "L", 3: "RGB"}


@dataclasses.dataclass(frozen=True)
class Source:
    """The encoded images of a split in random access; can go to another process.

    Attributes:
      where: dataset and split, for messages.
      examples: a sequence of {"image": encoded bytes, "label": int}.
      shape: height, width (None where they vary) and channels.
      num_classes: labels are below it.
    """

    where: str
    examples: Any
    shape: tuple[int | None, int | None, int]
    num_classes: int

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def mode(self) -> str:
        """PIL's name of the kind of image: "L" (grey) or "RGB"."""
        return _MODES[self.shape[-1]]

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        """Return an image, of which no more than the header is decoded, and its label.

        Raises:
          ValueError: where the bytes are no image.
        """
        example = self.examples[int(row)]
        try:
            image = Image.open(io.BytesIO(example["image"]))
        except OSError as error:
            raise self.damaged(row, error) from error
        return image, int(example["label"])

    def damaged(self, row: int, error: Exception) -> ValueError:
        """Return the error for an image that cannot be decoded."""
        return ValueError(
            f"Image {row} of {self.where} cannot be decoded: {error}\n"
            "`python experiments/prepare_data.py --check --sample=0` finds all such; "
            "prepare the dataset again."
        )


@functools.cache
def digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Split scikit-learn's 1,797 digits (8x8) 1,437 to 360, the same for everyone.

    Returns:
      Images uint8 [n, 8, 8, 1] and labels int32 [n] of "train" and of "test".
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    # 17 grey values, 0 to 16.
    images = (pixels * 15).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = np.split(order, [1437])
    return {
        "train": (images[train], labels[train]),
        "test": (images[test], labels[test]),
    }


def folder_of(config: base.Data) -> str:
    """Return the absolute folder of the tfds datasets.

    Raises:
      ValueError: where neither the config nor the environment names one.
    """
    folder = config.data_dir or os.environ.get("SPARSEJAX_DATA_DIR")
    if not folder:
        raise ValueError(
            f"Dataset {config.name!r} needs the folder of its tfds files: set "
            "`data.data_dir` or the environment variable SPARSEJAX_DATA_DIR. Only "
            "'digits' needs none."
        )
    if "://" in folder:  # of a bucket
        return folder
    return os.path.abspath(os.path.expanduser(folder))


def open_splits(name: str, folder: str, splits: tuple[str, ...]) -> list[Source]:
    """Open splits of a dataset that tfds has prepared as ArrayRecord.

    Args:
      name: as `tfds.builder` takes it: "fashion_mnist", "cifar10:3.0.2".
      folder: that of all tfds datasets.
      splits: as tfds names them and parts of them: "train", "train[:45000]".

    Raises:
      ValueError: where the dataset is unknown, not prepared, not whole, not prepared as
        ArrayRecord, or not images with one label each. The message says what to do.
    """
    import tensorflow_datasets as tfds

    builder = open_builder(name, folder)
    _check_files(builder, name, folder)
    shape, num_classes = _features(builder, name)
    for split in splits:
        _check_split(builder, name, split)
    try:
        examples = builder.as_data_source(
            list(splits), decoders={"image": tfds.decode.SkipDecoding()}
        )
    except NotImplementedError:
        raise ValueError(
            f"Dataset {name!r} in {builder.data_dir!r} is prepared, but not as "
            f"ArrayRecord: its format is {builder.info.file_format}.\n"
            + how_to_prepare(name, folder)
        ) from None
    sources = [
        Source(f"{builder.info.full_name}, split {split!r}", part, shape, num_classes)
        for split, part in zip(splits, examples, strict=True)
    ]
    for source in sources:
        if int(source.examples[0]["label"]) < 0:
            raise ValueError(f"{source.where} has no labels: take another split.")
    return sources


def open_builder(name: str, folder: str) -> Any:
    """Open a prepared dataset; a ValueError says what to do where there is none."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError:
        raise ValueError(
            f"Dataset {name!r} is neither 'digits' nor known to tfds "
            f"{tfds.__version__}, and {folder!r} has no folder of that name. See "
            "https://www.tensorflow.org/datasets/catalog/overview for the names. "
            "`python experiments/prepare_data.py --images=IMAGES "
            f"--name={name} --data_dir={folder}` makes one of your own images."
        ) from None
    if not builder.is_prepared():
        raise ValueError(
            f"Dataset {name!r} is not prepared: no {builder.data_dir!r}.\n"
            + how_to_prepare(name, folder)
        )
    return builder


def _check_files(builder: Any, name: str, folder: str) -> None:
    there = {path.name for path in builder.data_path.iterdir()}
    missing = sorted(
        file
        for split in builder.info.splits.values()
        for file in map(os.path.basename, split.filepaths)
        if file not in there
    )
    if missing:
        raise ValueError(
            f"Dataset {name!r} in {builder.data_dir!r} is not whole: {len(missing)} "
            f"files are missing, the first is {missing[0]!r}.\n"
            + how_to_prepare(name, folder)
        )


def _check_split(builder: Any, name: str, split: str) -> None:
    available = builder.info.splits
    if split.split("[")[0] not in available or not available[split].num_examples:
        raise ValueError(
            f"Dataset {name!r} has the splits {sorted(available)}, of which a part is "
            f"'train[:1000]', and no examples in {split!r}: set `data.train_split` and "
            "`data.test_split`."
        )


def _features(builder: Any, name: str) -> tuple[tuple[Any, Any, int], int]:
    import tensorflow_datasets as tfds

    features = dict(builder.info.features)
    image: Any = features.get("image")
    shape: Any = getattr(image, "shape", None)
    label = features.get("label")
    num_classes = getattr(label, "num_classes", None)
    is_image = isinstance(image, tfds.features.Image)
    is_known = is_image and shape[-1] in _MODES and image.np_dtype == np.uint8
    if not is_known or not num_classes:
        raise ValueError(
            f"Dataset {name!r} must have an 'image' of 1 or 3 channels of 8 bits and a "
            f"class 'label', got the features {features}."
        )
    return shape, num_classes


def how_to_prepare(name: str, folder: str) -> str:
    """Say how to prepare a tfds dataset."""
    return (
        "Prepare it once, where there is TensorFlow and a network:\n"
        "  pip install --editable '.[experiments]' tensorflow\n"
        f"  python experiments/prepare_data.py --name={name} --data_dir={folder}\n"
        "Then set `data.data_dir` or SPARSEJAX_DATA_DIR to the folder that holds it."
    )
