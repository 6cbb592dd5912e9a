import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from generated_images import write_files
from PIL import Image

from configs import base
from experiments import data
from experiments.data import prepare

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:tensorflow_datasets"  # at its import
)


def write_png(folder, split, of_class, count, size=(6, 5)):
    path = folder / split / of_class / "images"
    path.mkdir(parents=True)
    for number in range(count):
        Image.new("L", size, 20 * number).save(path / f"{number}.png")


@pytest.fixture
def images(tmp_path):
    """Two splits of two classes, grey and of one size."""
    for split, counts in (("train", (4, 2)), ("val", (1, 3))):
        for of_class, count in zip(("cat", "dog"), counts, strict=True):
            write_png(tmp_path / "images", split, of_class, count)
    return tmp_path / "images"


def test_a_folder_of_images_becomes_a_dataset(images, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_SHARD_BYTES", 200)
    folder = prepare.from_folder(images, "pets", tmp_path / "tfds")
    assert folder == tmp_path / "tfds" / "pets" / "1.0.0"
    assert len(list(folder.glob("pets-train.array_record-*"))) > 1

    dataset = data.load(
        base.Data("pets", str(tmp_path / "tfds"), test_split="val", augment="crop")
    )
    assert (dataset.num_train, dataset.num_test, dataset.num_classes) == (6, 4, 2)
    assert dataset.image_shape == (5, 6, 1)
    np.testing.assert_array_equal(dataset.train.labels, [0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(
        dataset.train.images[:, 0, 0, 0], [0, 20, 40, 60, 0, 20]
    )
    assert next(dataset.train_batches(8, seed=0))["image"].shape == (8, 5, 6, 1)


def test_tiny_imagenet_lists_its_validation_images(images, tmp_path):
    """They lie in one folder; a file has a line for each: name, class, a box."""
    write_png(tmp_path, "val", "", 3)
    shutil.rmtree(images / "val")
    (tmp_path / "val").rename(images / "val")
    classes = ("dog", "cat", "dog")
    lines = [f"{row}.png\t{name}\t0\t0\t5\t4\n" for row, name in enumerate(classes)]
    (images / "val" / "val_annotations.txt").write_text("".join(lines))
    prepare.from_folder(images, "tiny", tmp_path / "tfds")
    tiny = data.load(base.Data("tiny", str(tmp_path / "tfds"), test_split="val"))
    np.testing.assert_array_equal(tiny.test.labels, [1, 0, 1])
    np.testing.assert_array_equal(tiny.test.images[:, 0, 0, 0], [0, 20, 40])


def test_bytes_of_files_are_kept(tmp_path):
    write_files(tmp_path / "images", {"train": 4}, classes=2)
    prepare.from_folder(tmp_path / "images", "photos", tmp_path / "tfds")
    import tensorflow_datasets as tfds

    builder = tfds.builder("photos", data_dir=str(tmp_path / "tfds"))
    assert builder.info.features["label"].names == ["class0", "class1"]
    found = builder.as_data_source(
        "train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    files = sorted((tmp_path / "images").rglob("*.JPEG"))
    assert [example["image"] for example in found] == [f.read_bytes() for f in files]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.rename(f.with_name("other")), "There is no folder .*images"),
        (
            lambda f: write_png(f, "val", "cow", 1),
            r"images/train' lacks 'cow' and 0 more",
        ),
        (lambda f: (f / "new").mkdir(), r"images/new' lacks 'cat' and 1 more"),
        (lambda f: (f / "val/cat/bad.jpg").write_text("?"), r"bad.jpg' is no image: "),
        (
            lambda f: [p.unlink() for p in (f / "val").rglob("*.png")],
            r"\['train', 'val'\] must have images .*images/val' lacks 'cat' and 1 more",
        ),
        (
            lambda f: [p.unlink() for p in f.rglob("*.png")],
            r"images'/SPLIT/CLASS/ and end in one of .*: there are none",
        ),
        (
            lambda f: (f.parent / "tfds/pets/1.0.0").mkdir(parents=True),
            "exists: remove",
        ),
    ],
)
def test_folders_that_do_not_fit_leave_nothing_behind(images, tmp_path, spoil, message):
    spoil(images)
    with pytest.raises(ValueError, match=message):
        prepare.from_folder(images, "pets", tmp_path / "tfds")
    assert not [path for path in tmp_path.glob("tfds/**/*") if path.is_file()]


def test_an_interruption_leaves_nothing_behind(images, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare.io, "BytesIO", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare.from_folder(images, "pets", tmp_path / "tfds")
    assert not list((tmp_path / "tfds" / "pets").iterdir())


def test_a_check_says_what_is_there_and_what_is_wrong(tmp_path):
    write_files(tmp_path / "images", {"train": 6, "val": 3}, classes=3)
    folder = prepare.from_folder(tmp_path / "images", "photos", tmp_path / "tfds")
    report = "\n".join(prepare.check("photos", str(tmp_path / "tfds"), sample=0))
    assert f"photos/1.0.0 in {folder}" in report
    assert "train: 6 images, 3 classes; decoded 6 of 6" in report
    assert "val: 3 images, 3 classes; decoded 3 of 3" in report
    assert "heights 61 to 768, widths 40 to 1024; 3 classes among them" in report
    assert "WRONG" not in report
    sampled = "\n".join(prepare.check("photos", str(tmp_path / "tfds"), sample=2))
    assert "decoded 2 of 2" in sampled

    # A truncated JPEG among them, and a size that is not the dataset's.
    damaged = next((tmp_path / "images" / "train").rglob("0001.JPEG"))
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    prepare.from_folder(tmp_path / "images", "damaged", tmp_path / "tfds")
    report = list(prepare.check("damaged", str(tmp_path / "tfds"), sample=0))
    wrong = [line for line in report if line.startswith("WRONG")]
    assert len(wrong) == 1
    assert wrong[0].startswith("WRONG train: image file is truncated")


def test_the_command_line(images, tmp_path):
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "experiments/prepare_data.py", "--name=pets"]
    environment = os.environ | {"SPARSEJAX_DATA_DIR": str(tmp_path / "tfds")}
    run = lambda flag: subprocess.run(
        [*command, flag], cwd=root, env=environment, capture_output=True, text=True
    )
    missing = run("--check")
    assert missing.returncode == 1
    assert "'pets' is neither 'digits' nor known to tfds" in missing.stderr
    assert "Traceback" not in missing.stderr

    made = run(f"--images={images}")
    assert made.returncode == 0, made.stderr
    assert "train: 6 images, 2 classes; decoded 6 of 6" in made.stdout
    assert (tmp_path / "tfds/pets/1.0.0/dataset_info.json").exists()


def test_preparing_what_tfds_knows_needs_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ValueError, match="needs TensorFlow to prepare a dataset"):
        prepare.with_tfds("mnist", str(tmp_path))
    assert not list(tmp_path.iterdir())
