"""Prepare datasets, and find out what is wrong with them.

What tfds knows it prepares itself, for which it needs TensorFlow. A folder of images is
written here without: as the files that tfds would have written.
"""

import io
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from experiments.data import augment, sources

_SUFFIXES = (".jpg", ".jpeg", ".png")
_SHARD_BYTES = 256 * 2**20
_VERSION = "1.0.0"


class File(NamedTuple):
    """An encoded image and the place of its class among the sorted names."""

    path: pathlib.Path
    label: int


def with_tfds(name: str, data_dir: str) -> None:
    """Download and prepare a dataset that tfds knows, as ArrayRecord.

    Raises:
      ValueError: where TensorFlow is missing.
    """
    import tensorflow_datasets as tfds

    try:
        import tensorflow  # noqa: F401  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError(
            "tfds needs TensorFlow to prepare a dataset, and there is none: `pip "
            "install tensorflow`, here or elsewhere, and copy what it makes. "
            "Training needs no TensorFlow."
        ) from None
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()


def from_folder(
    images: str | os.PathLike,
    name: str,
    data_dir: str | os.PathLike,
    version: str = _VERSION,
) -> pathlib.Path:
    """Write the images of `images/SPLIT/CLASS/...` as a tfds dataset.

    The bytes of the files are kept as they are. Datasets of one image size can be held
    in memory by `experiments.data`, others are streamed. A split may also be as Tiny
    ImageNet's "val" is: `images/` and a file that tells their classes.

    Args:
      images: a folder with a folder for each split, with one for each class.
      name: of the dataset, as `tfds.builder` will take it.
      data_dir: folder of all tfds datasets.
      version: as tfds writes it; with a name that tfds knows, the version that it asks
        for.

    Returns:
      The folder of the dataset.

    Raises:
      ValueError: where folders are missing or do not fit, an image is damaged, or the
        dataset exists. Nothing is left behind.
    """
    splits, classes = _scan(pathlib.Path(images))
    folder = pathlib.Path(data_dir).expanduser().absolute() / name / version
    if folder.exists():
        raise ValueError(f"{folder} exists: remove it, or take another --name.")
    shape = _common_shape([file for files in splits.values() for file in files])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        target = pathlib.Path(unfinished) / version
        target.mkdir()
        _write(target, name, version, splits, classes, shape)
        target.rename(folder)
    return folder


def _scan(images: pathlib.Path) -> tuple[dict[str, list[File]], list[str]]:
    if not images.is_dir():
        raise ValueError(f"There is no folder {str(images)!r}.")
    splits = {path.name: _labelled(path) for path in images.iterdir() if path.is_dir()}
    classes = sorted({name for files in splits.values() for _, name in files})
    if not classes:
        raise ValueError(
            f"Images must lie in {str(images)!r}/SPLIT/CLASS/ and end in one of "
            f"{_SUFFIXES}: there are none."
        )
    for split, files in splits.items():
        if missing := sorted(set(classes) - {name for _, name in files}):
            raise ValueError(
                f"Images must lie in SPLIT/CLASS/, and all of {sorted(splits)} must "
                f"have images of the same classes: {str(images / split)!r} lacks "
                f"{missing[0]!r} and {len(missing) - 1} more."
            )
    labels = {name: label for label, name in enumerate(classes)}
    return {
        split: [File(path, labels[name]) for path, name in splits[split]]
        for split in sorted(splits)
    }, classes


def _labelled(split: pathlib.Path) -> list[tuple[pathlib.Path, str]]:
    """Return the images of a split, each with the name of its class."""
    annotations = split / f"{split.name}_annotations.txt"
    if annotations.exists():  # as Tiny ImageNet's validation images have them
        lines = annotations.read_text().splitlines()
        named = [line.split("\t")[:2] for line in lines]
        return [(split / "images" / file, name) for file, name in named]
    return [
        (path, of_class.name)
        for of_class in sorted(split.iterdir())
        for path in sorted(of_class.rglob("*"))
        if path.suffix.lower() in _SUFFIXES
    ]


def _common_shape(files: Sequence[File]) -> tuple[int | None, int | None, int]:
    """Return height and width, None where they vary, and 1 (all are grey) or 3."""
    sizes, grey = set(), True
    for path, _ in files:
        try:
            with Image.open(path) as image:
                sizes.add(image.size)
                grey &= image.mode == "L"
        except OSError as error:
            raise ValueError(f"{str(path)!r} is no image: {error}") from error
    width, height = sizes.pop() if len(sizes) == 1 else (None, None)
    return height, width, 1 if grey else 3


def _write(
    folder: pathlib.Path,
    name: str,
    version: str,
    splits: Mapping[str, Sequence[File]],
    classes: Sequence[str],
    shape: tuple[int | None, int | None, int],
) -> None:
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=shape),
            "label": tfds.features.ClassLabel(names=list(classes)),
        }
    )
    infos = []
    for split, files in splits.items():
        size = sum(file.path.stat().st_size for file in files)
        shards = np.array_split(np.arange(len(files)), math.ceil(size / _SHARD_BYTES))
        progress = tqdm(total=len(files), desc=split, unit=" images")
        for shard, rows in enumerate(shards):
            # As tfds reads them: one record a group, for random access.
            writer = ArrayRecordWriter(
                str(
                    folder
                    / f"{name}-{split}.array_record-{shard:05}-of-{len(shards):05}"
                ),
                "group_size:1",
            )
            for row in rows:
                path, label = files[row]
                example = {"image": io.BytesIO(path.read_bytes()), "label": label}
                writer.write(features.serialize_example(example))
                progress.update()
            writer.close()
        progress.close()
        lengths = [len(rows) for rows in shards]
        infos.append(
            tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size)
        )
    tfds.folder_dataset.write_metadata(
        data_dir=os.fspath(folder),
        features=features,
        split_infos=infos,
        version=version,
        check_data=False,  # which would need TensorFlow
    )


def check(name: str, data_dir: str, sample: int) -> Iterator[str]:
    """Open a prepared dataset, decode images, and say what is there.

    Args:
      name: of the dataset.
      data_dir: folder of all tfds datasets.
      sample: images of each split to decode, in even distances; 0: all.

    Yields:
      Lines of a report; those about damage begin with "WRONG".

    Raises:
      ValueError: as `sources.open_splits`, where there is nothing to look at.
    """
    builder = sources.open_builder(name, data_dir)
    splits = sorted(builder.info.splits)
    yield f"{builder.info.full_name} in {builder.data_dir}"
    for split, source in zip(
        splits, sources.open_splits(name, data_dir, tuple(splits)), strict=True
    ):
        yield from _check_split(split, source, sample)


def _check_split(split: str, source: sources.Source, sample: int) -> Iterator[str]:
    rows = range(0, len(source), max(len(source) // sample, 1) if sample else 1)
    sizes, labels, damaged = [], [], []
    for row in tqdm(rows, desc=split, unit=" images", leave=False):
        try:
            image, label = source[row]
            sizes.append(augment.to_array(augment.as_mode(image, source.mode)).shape)
            labels.append(label)
        except (OSError, ValueError) as error:
            damaged.append(str(error).splitlines()[0])
    yield (
        f"{split}: {len(source):,} images, {source.num_classes} classes; decoded "
        f"{len(sizes):,} of {len(rows):,}"
    )
    if sizes:
        heights, widths, _ = np.transpose(sizes)
        yield (
            f"  heights {heights.min()} to {heights.max()}, widths {widths.min()} to "
            f"{widths.max()}; {len(set(labels))} classes among them"
        )
    yield from (f"WRONG {split}: {error}" for error in damaged)
    for wrong in sorted({size for size in sizes if not _fits(size, source.shape)}):
        yield f"WRONG {split}: an image of {wrong}, the dataset says {source.shape}"
    for label in sorted({x for x in labels if not 0 <= x < source.num_classes}):
        yield f"WRONG {split}: label {label} of {source.num_classes} classes"


def _fits(size: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    return all(b in (None, a) for a, b in zip(size, shape, strict=True))
