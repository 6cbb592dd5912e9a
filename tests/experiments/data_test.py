import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from configs import base
from experiments import data
from experiments.data import sources

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:tensorflow_datasets"  # at its import
)

CROP = base.Data(augment="crop")
RESIZED = base.Data(augment="resized_crop")
MIXED = base.Data(augment="crop_reflect", mixup=0.2, cutmix=1.0, rand_augment=1)
CONFIGS = pytest.mark.parametrize("config", [base.Data(), CROP, RESIZED, MIXED])


def in_memory(images, labels, config=CROP, num_classes=10):
    """A dataset of these images, to train on and to test with."""
    split = data.Split(images, labels)
    moments = np.ones(images.shape[-1], np.float32)
    return data.Dataset(config, split, split, num_classes, moments, moments)


@pytest.fixture
def numbered():
    """Images that say which example they are: the label is the row."""
    rows = np.arange(10)
    images = np.zeros((10, 8, 8, 1), np.uint8) + rows[:, None, None, None]
    return in_memory(images.astype(np.uint8), rows.astype(np.int32), base.Data())


def take(batches, n):
    """Concatenate the next n batches."""
    taken = [next(batches) for _ in range(n)]
    return {name: np.concatenate([b[name] for b in taken]) for name in taken[0]}


def test_digits_are_real_images_split_without_overlap():
    digits = data.load(base.Data())
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.image_shape == (8, 8, 1)
    assert digits.train.images.dtype == np.uint8
    for split in (digits.train, digits.test):
        assert set(split.labels) == set(range(digits.num_classes))
    from sklearn.datasets import load_digits

    original = _as_set(*load_digits(return_X_y=True))
    pixels = np.concatenate([digits.train.images, digits.test.images]).reshape(-1, 64)
    labels = np.concatenate([digits.train.labels, digits.test.labels])
    assert _as_set(pixels / 15.0, labels) == original


def _as_set(images, labels):
    return sorted((x.tobytes(), y) for x, y in zip(images, labels, strict=True))


def test_normalized_training_images_have_mean_0_and_deviation_1():
    digits = data.load(base.Data())
    images = np.asarray(digits.normalize(digits.train.images))
    assert images.dtype == np.float32
    assert abs(images.mean()) < 1e-4 and abs(images.std() - 1) < 1e-4
    # The statistics are the training split's, whatever is normalized.
    np.testing.assert_allclose(
        jax.jit(digits.normalize)(jnp.asarray(digits.test.images[:3])),
        (digits.test.images[:3] - digits.train.images.mean())
        / digits.train.images.std(),
        atol=1e-5,
    )


def test_moments_can_be_given():
    config = base.Data(mean=(0.5,), std=(0.25,))
    images = np.array([0, 127.5, 255]).reshape(3, 1, 1, 1)
    normalized = np.asarray(data.load(config).normalize(images)).ravel()
    np.testing.assert_allclose(normalized, [-2, 0, 2], atol=1e-6)
    with pytest.raises(
        ValueError, match=r"data.mean must be .*1 numbers, got \(0.5, 0"
    ):
        data.load(base.Data(mean=(0.5, 0.5), std=(1, 1)))


def test_an_epoch_has_every_example_once_and_epochs_differ(numbered):
    batches = numbered.train_batches(5, seed=0)
    epochs = [take(batches, 2) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch["label"]) == list(range(10))
        np.testing.assert_array_equal(epoch["image"][:, 0, 0, 0], epoch["label"])
    orders = {tuple(epoch["label"]) for epoch in epochs}
    assert len(orders) == 3


def test_a_batch_reaches_into_the_next_epoch(numbered):
    labels = take(numbered.train_batches(4, seed=0), 15)["label"].reshape(6, 10)
    np.testing.assert_array_equal(np.sort(labels), np.tile(np.arange(10), (6, 1)))


@CONFIGS
def test_the_seed_determines_the_batches(config):
    digits = data.load(config)
    first, again, other = (
        take(digits.train_batches(4, seed=seed), 10) for seed in (1, 1, 2)
    )
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert (first["label"] != other["label"]).any()


@CONFIGS
@pytest.mark.parametrize("process_count", [2, 4])
def test_batches_of_processes_in_a_row_are_those_of_one(config, process_count):
    digits = data.load(config)
    whole = digits.train_batches(16, seed=3)
    parts = [
        digits.train_batches(16, seed=3, process_index=i, process_count=process_count)
        for i in range(process_count)
    ]
    # 1,437 images: these batches reach into the second epoch.
    for batches in (whole, *parts):
        batches.set_state({"examples": 80 * 16})
    for _ in range(20):
        expected, found = next(whole), [next(part) for part in parts]
        for name, values in expected.items():
            joined = np.concatenate([part[name] for part in found])
            np.testing.assert_array_equal(joined, values, strict=True)


@pytest.mark.parametrize("config", [base.Data(), CROP])
def test_the_batch_size_does_not_change_the_examples(config):
    digits = data.load(config)
    small = take(digits.train_batches(8, seed=3), 50)
    large = take(digits.train_batches(40, seed=3), 10)
    for name, values in small.items():
        np.testing.assert_array_equal(values, large[name])


@CONFIGS
def test_a_saved_position_is_continued(config, tmp_path):
    digits = data.load(config)
    batches = digits.train_batches(32, seed=0)
    take(batches, 43)  # 1,376 of 1,437
    ocp.save_checkpointables(tmp_path / "saved", {"data": batches})
    expected = take(batches, 7)

    continued = digits.train_batches(32, seed=0)
    next(continued)
    ocp.load_checkpointables(tmp_path / "saved", {"data": continued})
    assert continued.get_state() == {"examples": 43 * 32}
    for name, values in take(continued, 7).items():
        np.testing.assert_array_equal(values, expected[name])


def test_a_position_fits_any_number_of_processes(tmp_path, numbered):
    batches = numbered.train_batches(4, seed=0)
    take(batches, 6)
    ocp.save_checkpointables(tmp_path / "saved", {"data": batches})
    # As process 0 of 3 has saved it, read by one that is alone.
    (file,) = (tmp_path / "saved").rglob("process_0-of-1.json")
    file.rename(file.with_name("process_0-of-3.json"))
    continued = numbered.train_batches(2, seed=0)
    ocp.load_checkpointables(tmp_path / "saved", {"data": continued})
    np.testing.assert_array_equal(
        take(continued, 4)["label"], take(batches, 2)["label"]
    )


def test_a_position_inside_a_batch_is_refused(numbered):
    batches = numbered.train_batches(4, seed=0)
    with pytest.raises(
        ValueError, match="multiple of the batch size, which is 4, got 6"
    ):
        batches.set_state({"examples": 6})


@pytest.mark.parametrize(
    ("kind", "mode"), [("crop", "constant"), ("crop_reflect", "reflect")]
)
def test_augmented_images_are_crops_and_flips_of_the_padded_ones(kind, mode):
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (6, 8, 10, 3)).astype(np.uint8)
    dataset = in_memory(
        images, np.arange(6, dtype=np.int32), base.Data(augment=kind), num_classes=6
    )
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (8, 10), axis=(1, 2))
    possible = [
        {
            variant.tobytes(): (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip, variant in enumerate(_both(windows[row, top, left]))
        }
        for row in range(6)
    ]

    batch = take(dataset.train_batches(50, seed=0), 40)
    drawn = [
        possible[row][image.tobytes()]
        for image, row in zip(batch["image"], batch["label"], strict=True)
    ]
    tops, lefts, flips = np.array(drawn).T
    assert set(tops) == set(lefts) == set(range(9))
    assert 0.45 < flips.mean() < 0.55
    # Independent of one another: with 2,000 draws nearly all of the 162 occur.
    assert len(set(drawn)) > 155


def _both(window):
    image = window.transpose(1, 2, 0)
    return np.ascontiguousarray(image), np.ascontiguousarray(image[:, ::-1])


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 12, 16])
def test_evaluation_counts_every_example_once(numbered, batch_size, process_count):
    counts = np.zeros(10)
    number_of_batches = set()
    for process_index in range(process_count):
        batches = list(
            numbered.eval_batches(
                batch_size, process_index=process_index, process_count=process_count
            )
        )
        number_of_batches.add(len(batches))
        for batch in batches:
            assert batch["weight"].shape == (batch_size // process_count,)
            assert batch["image"].shape == (batch_size // process_count, 8, 8, 1)
            np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
            np.add.at(counts, batch["label"], batch["weight"])
    np.testing.assert_array_equal(counts, 1)
    assert len(number_of_batches) == 1


@pytest.mark.parametrize("batch_size", [0, 3, -2])
def test_processes_must_share_a_batch_equally(numbered, batch_size):
    message = rf"positive multiple of the 2 process\(es\), got {batch_size}"
    with pytest.raises(ValueError, match=message):
        numbered.train_batches(batch_size, seed=0, process_count=2)
    with pytest.raises(ValueError, match=message):
        numbered.eval_batches(batch_size, process_count=2)
    with pytest.raises(ValueError, match=r"process_index must be in \[0, 2\), got 2"):
        numbered.eval_batches(4, process_index=2, process_count=2)


def test_mixing_needs_pairs_on_every_process(numbered):
    config = dataclasses.replace(numbered.config, mixup=0.2)
    mixed = dataclasses.replace(numbered, config=config)
    with pytest.raises(ValueError, match=r"two for each of the 2 process\(es\), got 6"):
        mixed.train_batches(6, seed=0, process_count=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"augment": "flip"}, r"data.augment must be one of \('none', .* got 'flip'"),
        ({"mixup": -0.1}, "data.mixup must be at least 0, got -0.1"),
        ({"magnitude": 31}, "data.magnitude must be 0 to 30, got 31"),
        ({"mean": (0.5,)}, "data.std must be as many positive numbers as"),
        ({"mean": (0.5,), "std": (0.0,)}, "data.std must be as many positive numbers"),
        ({"stream": True}, "data.stream must be False for 'digits'"),
        ({"workers": 2}, "data.stream must be True where workers or image_size"),
        ({"image_size": 8}, "data.stream must be True where workers or image_size"),
        ({"train_split": "training"}, r"splits \['train', 'test'\], got {'training'}"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        data.load(base.Data(**fields))


def test_a_dataset_needs_a_folder(monkeypatch):
    monkeypatch.delenv("SPARSEJAX_DATA_DIR", raising=False)
    with pytest.raises(ValueError, match="'mnist' needs the folder .*SPARSEJAX_DATA_D"):
        data.load(base.Data("mnist"))


def test_the_folder_of_datasets(monkeypatch):
    monkeypatch.setenv("SPARSEJAX_DATA_DIR", "~/datasets")
    home = os.path.expanduser("~")
    assert sources.folder_of(base.Data("mnist")) == f"{home}/datasets"
    assert sources.folder_of(base.Data("mnist", "/here")) == "/here"
    assert sources.folder_of(base.Data("mnist", "gs://bucket/x")) == "gs://bucket/x"


def test_a_dataset_that_is_not_prepared_says_how(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEJAX_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError) as error:
        data.load(base.Data("mnist"))
    message = str(error.value)
    assert f"no '{tmp_path}/mnist/" in message
    assert f"experiments/prepare_data.py --name=mnist --data_dir={tmp_path}" in message
    assert "SPARSEJAX_DATA_DIR" in message
    assert not list(tmp_path.iterdir())

    with pytest.raises(ValueError, match="'no_such_images' is neither 'digits' nor"):
        data.load(base.Data("no_such_images"))


# Counts and channel means (of pixels in [0, 1]) as they are published.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes", "shape", "classes", "mean", "std"),
    [
        ("fashion_mnist", (60_000, 10_000), (28, 28, 1), 10, [0.2860], [0.3530]),
        (
            "cifar10",
            (50_000, 10_000),
            (32, 32, 3),
            10,
            [0.4914, 0.4822, 0.4465],
            [0.2470, 0.2435, 0.2616],
        ),
    ],
)
def test_tfds_datasets(data_dir, name, sizes, shape, classes, mean, std):
    config = base.Data(name, str(data_dir), augment="crop")
    dataset = data.load(config)
    assert (dataset.num_train, dataset.num_test) == sizes
    assert dataset.image_shape == shape
    assert dataset.num_classes == classes
    np.testing.assert_allclose(dataset.mean / 255, mean, atol=1e-4)
    np.testing.assert_allclose(dataset.std / 255, std, atol=1e-4)
    assert (np.bincount(dataset.test.labels) == sizes[1] // classes).all()
    batch = next(dataset.train_batches(128, seed=0))
    assert batch["image"].shape == (128, *shape)


def test_a_part_of_a_tfds_dataset(data_dir):
    parts = {"train_split": "train[:3000]", "test_split": "test[-500:]"}
    config = base.Data("fashion_mnist", str(data_dir), **parts)
    dataset = data.load(config)
    assert (dataset.num_train, dataset.num_test) == (3000, 500)
    np.testing.assert_allclose(dataset.mean / 255, [0.2860], atol=0.01)
    np.testing.assert_allclose(dataset.std / 255, [0.3530], atol=0.01)
    again = data.load(dataclasses.replace(config, augment="crop"))
    assert again.train.images is dataset.train.images  # it is read once


def test_tfds_dataset_with_another_number_of_classes(data_dir):
    folder = data_dir / "samples"
    if not folder.is_dir():
        pytest.skip(f"{folder} with a sample of cifar100 is not there")
    dataset = data.load(base.Data("cifar100", str(folder)))
    assert dataset.num_classes == 100
    assert set(dataset.train.labels) == set(range(100))
