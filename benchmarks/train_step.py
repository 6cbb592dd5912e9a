"""Training steps with and without sparsity, and whether images arrive in time for them.

    python benchmarks/train_step.py [--out results]

Steps are those of ResNet-18 on CIFAR and of ResNet-50 at 224 pixels, dense and by three
algorithms, one after another in turn; see `steps_in_turn.py`.

CIFAR-like images (random pixels) are held in memory and cropped with padding. JPEG
files of ImageNet's sizes (generated) are read from an ArrayRecord file, decoded,
cropped at random and resized to 224 pixels, in threads or by worker processes. Neither
needs a dataset. The first batch, for which workers start, is left out, and so are those
that are made before somebody asks.
"""

import argparse
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from absl import flags

# A script finds its own folder first; the modules are named from the repository root.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks import pages, photographs, steps_in_turn  # noqa: E402
from configs import base  # noqa: E402
from experiments import data  # noqa: E402
from experiments.data import prepare  # noqa: E402

Row = dict[str, float]

_PHOTOGRAPHS = 500
_BATCHES_AHEAD = 8


def cifar(augment: str) -> data.Dataset:
    """Return as many images as CIFAR-10 has, in memory."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50_000, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, 50_000, np.int32)
    config = base.Data(augment=augment)
    split = data.Split(images, labels)
    moments = np.full(3, 128, np.float32)
    return data.Dataset(config, split, split, 10, moments, moments)


def imagenet(data_dir: str, **fields) -> data.Dataset:
    """Open the generated photographs as ImageNet is configured."""
    return data.load(
        base.Data(
            name="photographs",
            data_dir=data_dir,
            test_split="train",
            stream=True,
            image_size=224,
            augment="resized_crop",
            **fields,
        )
    )


def input_pipelines(data_dir: str) -> Iterator[tuple[str, data.Dataset, int]]:
    """Yield name, dataset and batch size of what is measured."""
    yield "CIFAR, in memory, as stored", cifar("none"), 128
    yield "CIFAR, in memory, crop and flip", cifar("crop"), 128
    for workers in (0, 1, 2):
        how = ("threads", "1 worker", "2 workers")[workers]
        yield f"JPEG at 224, {how}", imagenet(data_dir, workers=workers), 64
    vit = {"rand_augment": 2, "mixup": 0.2, "cutmix": 1.0}
    name = "JPEG at 224, threads, RandAugment, mixup or cutmix"
    yield name, imagenet(data_dir, **vit), 64


def images_per_second(dataset: data.Dataset, batch_size: int, seconds: float) -> Row:
    """Take batches for so long, five times; return median, least and most."""
    batches = dataset.train_batches(batch_size, seed=0)
    begin = time.perf_counter()
    next(batches)
    row = {"first batch s": time.perf_counter() - begin}
    for _ in range(_BATCHES_AHEAD):
        next(batches)
    rates = []
    for _ in range(5):
        count, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds / 5:
            count += len(next(batches)["label"])
        rates.append(count / (time.perf_counter() - begin))
    batches.close()
    rates = {"images/s": statistics.median(rates), "min": min(rates), "max": max(rates)}
    return rates | row


def measure_input(seconds: float) -> dict[str, Row]:
    """Measure all input pipelines; return the figures by name."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        photographs.write(pathlib.Path(folder, "files", "train"), _PHOTOGRAPHS)
        data_dir = os.path.join(folder, "tfds")
        prepare.from_folder(os.path.join(folder, "files"), "photographs", data_dir)
        for name, dataset, batch_size in input_pipelines(data_dir):
            rows[name] = images_per_second(dataset, batch_size, seconds)
    return rows


def table(rows: dict[str, Row]) -> str:
    """Return figures as a Markdown table."""
    columns = list(next(iter(rows.values())))
    cell = lambda value: f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
    return "\n".join(
        [
            "| | " + " | ".join(columns) + " |",
            "|---" * (len(columns) + 1) + "|",
            *(
                f"| {name} | " + " | ".join(cell(row[c]) for c in columns) + " |"
                for name, row in rows.items()
            ),
        ]
    )


def main() -> None:
    """Measure, print the tables, and write them where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=10, help="of each pipeline")
    parser.add_argument("--step-seconds", type=float, default=60, help="of a network")
    parser.add_argument("--batches", type=int, nargs=2, default=[128, 32])
    parser.add_argument("--out", type=pathlib.Path, help="folder for the tables")
    args = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags
    networks = steps_in_turn.networks(*args.batches)
    figures = {
        "steps": steps_in_turn.measure(args.step_seconds, networks),
        "input": measure_input(args.seconds),
    }
    text = (
        f"## Steps\n\n{table(figures['steps'])}\n\n"
        f"## Input\n\n{table(figures['input'])}"
    )
    pages.publish("train_step", text, figures, args.out)


if __name__ == "__main__":
    main()
