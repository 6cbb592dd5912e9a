import dataclasses
import pathlib
import pickle
import shutil
import time

import generated_images
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from PIL import Image

from configs import base
from experiments import data
from experiments.data import prepare
from experiments.data.order import Order

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:tensorflow_datasets"  # at its import
)

SIZE = 32


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Generated JPEGs, as ImageNet is configured."""
    return base.Data(
        name="imagenet2012",
        data_dir=str(generated_images.imagenet(tmp_path_factory.mktemp("imagenet"))),
        test_split="validation",
        stream=True,
        image_size=SIZE,
        augment="resized_crop",
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Images of one size, which fit both ways of reading."""
    folder = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    for number in range(30):
        path = (
            folder / "files" / ("train" if number < 20 else "test") / f"c{number % 2}"
        )
        path.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{number}.png")
    prepare.from_folder(folder / "files", "cifar10", folder / "tfds", "3.0.2")
    return base.Data(name="cifar10", data_dir=str(folder / "tfds"))


def take(batches, n):
    taken = [next(batches) for _ in range(n)]
    return {name: np.concatenate([b[name] for b in taken]) for name in taken[0]}


def test_what_imagenet_looks_like(config):
    dataset = data.load(config)
    assert (dataset.num_train, dataset.num_test) == (20, 7)
    assert (dataset.image_shape, dataset.num_classes) == ((SIZE, SIZE, 3), 1000)
    np.testing.assert_allclose(dataset.mean / 255, [0.485, 0.456, 0.406], rtol=1e-6)
    np.testing.assert_allclose(dataset.std / 255, [0.229, 0.224, 0.225], rtol=1e-6)
    batch = next(dataset.train_batches(8, seed=0))
    assert (batch["image"].shape, batch["image"].dtype) == (
        (8, SIZE, SIZE, 3),
        np.uint8,
    )
    assert batch["label"].dtype == np.int32


def test_an_epoch_has_every_example_once(config):
    labels = take(data.load(config).train_batches(5, seed=0), 8)["label"].reshape(2, 20)
    for epoch in labels:
        np.testing.assert_array_equal(np.bincount(epoch), [4] * 5)


@pytest.mark.parametrize("process_count", [2, 4])
def test_batches_of_processes_in_a_row_are_those_of_one(config, process_count):
    config = dataclasses.replace(config, rand_augment=2, mixup=0.2, cutmix=1.0)
    dataset = data.load(config)
    whole = dataset.train_batches(8, seed=1)
    parts = [
        dataset.train_batches(8, seed=1, process_index=i, process_count=process_count)
        for i in range(process_count)
    ]
    for _ in range(3):
        expected, found = next(whole), [next(part) for part in parts]
        for name, values in expected.items():
            joined = np.concatenate([part[name] for part in found])
            np.testing.assert_array_equal(joined, values, strict=True)


def test_epochs_crop_the_same_image_differently(config):
    first, second = (
        take(data.load(config).train_batches(20, seed=seed), 2) for seed in (0, 1)
    )
    images = np.concatenate([first["image"], second["image"]])
    # A crop of the smallest images may well be drawn twice.
    assert len({image.tobytes() for image in images}) > 70


def test_a_saved_position_is_continued(config, tmp_path):
    dataset = data.load(config)
    batches = dataset.train_batches(4, seed=0)
    take(batches, 3)
    ocp.save_checkpointables(tmp_path / "saved", {"data": batches})
    expected = take(batches, 4)
    continued = dataset.train_batches(4, seed=0)
    next(continued)
    ocp.load_checkpointables(tmp_path / "saved", {"data": continued})
    for name, values in take(continued, 4).items():
        np.testing.assert_array_equal(values, expected[name])


@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_sees_the_centre_of_every_example_once(config, process_count):
    parts = [
        list(
            data.load(config).eval_batches(
                4, process_index=i, process_count=process_count
            )
        )
        for i in range(process_count)
    ]
    assert {len(part) for part in parts} == {2}
    batches = [batch for together in zip(*parts, strict=True) for batch in together]
    joined = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    np.testing.assert_array_equal(joined["weight"], [1] * 7 + [0])
    np.testing.assert_array_equal(joined["label"][:7], [0, 0, 1, 1, 2, 3, 4])


def test_evaluation_sees_seven_eighths_of_the_shorter_side(config):
    """Against the whole file resized, of which the middle is cut."""
    dataset = data.load(dataclasses.replace(config, image_size=224))
    paths = sorted(pathlib.Path(config.data_dir, "../files/validation").rglob("*.JPEG"))
    assert len(paths) == dataset.num_test
    for path, found in zip(paths, dataset.test.images, strict=True):
        image = Image.open(path).convert("RGB")
        sides = [round(side * 256 / min(image.size)) for side in image.size]
        whole = np.asarray(image.resize(sides, Image.Resampling.BILINEAR), float)
        top, left = ((side - 224) // 2 for side in whole.shape[:2])
        expected = whole[top : top + 224, left : left + 224]
        assert expected.std() > 20
        # Rounding moves the expected ones by up to a pixel; another crop gives 30.
        assert np.abs(expected - found).mean() < 10, path


def test_streamed_and_held_in_memory_are_the_same(small):
    for kind in ("crop", "crop_reflect", "resized_crop"):
        config = dataclasses.replace(small, augment=kind, padding=3, rand_augment=1)
        held = data.load(config)
        moments = {"mean": (0.5,), "std": (0.5,)}
        streamed = data.load(dataclasses.replace(config, stream=True, **moments))
        assert held.image_shape == streamed.image_shape == (32, 32, 3)
        for one, other in zip(
            [*[next(held.train_batches(50, seed=0))], *held.eval_batches(4)],
            [*[next(streamed.train_batches(50, seed=0))], *streamed.eval_batches(4)],
            strict=True,
        ):
            for name, values in one.items():
                np.testing.assert_array_equal(other[name], values, strict=True)
        np.testing.assert_array_equal(streamed.test.images, held.test.images)
        np.testing.assert_array_equal(streamed.test.labels, held.test.labels)


def test_a_part_of_a_split(small):
    config = dataclasses.replace(
        small, train_split="train[:15]", test_split="train[15:]"
    )
    whole, parts = data.load(small), data.load(config)
    assert (parts.num_train, parts.num_test) == (15, 5)
    together = np.concatenate([parts.train.images, parts.test.images])
    np.testing.assert_array_equal(together, whole.train.images)


def test_sizes_that_vary_need_a_size(config):
    with pytest.raises(ValueError, match="images of several sizes, .*data.stream=True"):
        data.load(base.Data(config.name, config.data_dir, test_split="validation"))
    unsized = dataclasses.replace(config, image_size=0)
    with pytest.raises(ValueError, match="several sizes, .*: set `data.image_size`"):
        data.load(unsized)


def test_a_split_that_is_not_there(config):
    with pytest.raises(
        ValueError, match=r"\['train', 'validation'\].* no examples in 'test'"
    ):
        data.load(dataclasses.replace(config, test_split="test"))
    with pytest.raises(ValueError, match=r"no examples in 'validation\[7:\]'"):
        data.load(dataclasses.replace(config, test_split="validation[7:]"))


def test_a_file_that_is_missing(small, tmp_path):
    shutil.copytree(small.data_dir, tmp_path, dirs_exist_ok=True)
    (file,) = tmp_path.rglob("*-test.array_record-*")
    file.unlink()
    message = (
        f"is not whole: 1 files are missing, the first is '{file.name}'\\.\nPrepare"
    )
    with pytest.raises(ValueError, match=message):
        data.load(dataclasses.replace(small, data_dir=str(tmp_path)))


def test_a_split_without_labels(small):
    import tensorflow_datasets as tfds

    # As tfds marks them.
    unlabelled = [{"image": b"", "label": -1}]
    with pytest.MonkeyPatch.context() as patch:
        as_data_source = lambda self, splits, decoders: [unlabelled for _ in splits]
        patch.setattr(tfds.core.DatasetBuilder, "as_data_source", as_data_source)
        with pytest.raises(ValueError, match="'train' has no labels: take another"):
            data.load(dataclasses.replace(small, stream=True))


@pytest.mark.parametrize("damage", [lambda x: x[: len(x) // 2], lambda x: b"no image"])
def test_a_damaged_image_is_named(config, damage):
    class Damaged(list):
        def __getitem__(self, row):
            example = super().__getitem__(row)
            return example | ({"image": damage(example["image"])} if row == 3 else {})

    dataset = data.load(config)
    source = dataset.train.source
    examples = Damaged([source.examples[row] for row in range(4)])
    split = dataclasses.replace(
        dataset.train, source=dataclasses.replace(source, examples=examples)
    )
    dataset = dataclasses.replace(dataset, train=split)
    with pytest.raises(
        ValueError, match=r"(?s)Image 3 of imagenet2012.*prepare_data.py --c"
    ):
        next(dataset.train_batches(4, seed=0))


def test_mocked_imagenet(config):
    with generated_images.mocked(config.data_dir):
        dataset = data.load(config)
        assert dataset.num_train == dataset.num_test == 6
        batch = next(dataset.train_batches(8, seed=0))
        assert batch["image"].shape == (8, SIZE, SIZE, 3)
        assert batch["image"].std() > 20
        assert sum(b["weight"].sum() for b in dataset.eval_batches(4)) == 6


def test_mocked_cifar10(small):
    # Another folder than in other tests: what is in memory is kept by folder.
    small = dataclasses.replace(small, train_split="train[:100%]", augment="crop")
    with generated_images.mocked(small.data_dir):
        dataset = data.load(small)
        assert dataset.num_train == 6
        assert next(dataset.train_batches(4, seed=0))["image"].shape == (4, 32, 32, 3)


def test_what_goes_to_a_worker_makes_the_same_batches(config):
    source = data.load(config).train_batches(8, seed=0)._source
    batch = source[2]
    for name, values in pickle.loads(pickle.dumps(source))[2].items():
        np.testing.assert_array_equal(values, batch[name])

    order = Order(100_000, seed=0)
    order[np.arange(5)]
    assert len(pickle.dumps(order)) < 1000  # the epochs are drawn anew


def test_the_time_that_is_waited_for_images_is_counted(config):
    batches = data.load(config).train_batches(4, seed=0)
    assert batches.seconds == 0
    begin = time.perf_counter()
    for _ in range(3):
        before = batches.seconds
        next(batches)
        assert batches.seconds > before
    assert batches.seconds <= time.perf_counter() - begin


@pytest.mark.slow
def test_workers_make_the_same_batches(config, tmp_path):
    expected = take(data.load(config).train_batches(4, seed=0), 9)
    for workers in (1, 2):
        dataset = data.load(dataclasses.replace(config, workers=workers))
        batches = dataset.train_batches(4, seed=0)
        found = take(batches, 5)
        # A position of one number of workers is that of another.
        other = data.load(dataclasses.replace(config, workers=3 - workers))
        continued = other.train_batches(4, seed=0)
        continued.set_state(batches.get_state())
        batches.close()
        rest = take(continued, 4)
        continued.close()
        for name, values in expected.items():
            joined = np.concatenate([found[name], rest[name]])
            np.testing.assert_array_equal(joined, values, strict=True)


@pytest.mark.slow
def test_a_damaged_image_is_named_by_a_worker(tmp_path):
    files = tmp_path / "files"
    generated_images.write_files(files, {"train": 4, "validation": 1}, classes=1)
    damaged = files / "train" / "class0" / "0002.JPEG"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    prepare.from_folder(files, "photos", tmp_path / "tfds")
    fields = {"test_split": "validation", "stream": True, "image_size": 8}
    config = base.Data("photos", str(tmp_path / "tfds"), workers=1, **fields)
    with pytest.raises(
        Exception, match="Image 2 of photos/1.0.0, split 'train' cannot"
    ):
        next(data.load(config).train_batches(4, seed=0))
