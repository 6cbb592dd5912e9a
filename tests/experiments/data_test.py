import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data


@pytest.fixture
def split():
    """Images that say which example they are: the label is the row."""
    rows = np.arange(10)
    images = np.zeros((10, 8, 8, 1), np.uint8) + rows[:, None, None, None]
    return data.Split(images.astype(np.uint8), rows.astype(np.int32))


def take(batches, n):
    """Concatenate the next n batches."""
    taken = [next(batches) for _ in range(n)]
    return {name: np.concatenate([b[name] for b in taken]) for name in taken[0]}


def test_digits_are_real_images_split_without_overlap():
    digits = data.load("digits")
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
    digits = data.load("digits")
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


def test_an_epoch_has_every_example_once_and_epochs_differ(split):
    batches = data.train_batches(split, 5, seed=0)
    epochs = [take(batches, 2) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch["label"]) == list(range(10))
        np.testing.assert_array_equal(epoch["image"][:, 0, 0, 0], epoch["label"])
    orders = {tuple(epoch["label"]) for epoch in epochs}
    assert len(orders) == 3


@pytest.mark.parametrize("augment", [False, True])
def test_the_seed_determines_the_order(split, augment):
    first, again, other = (
        take(data.train_batches(split, 4, seed=seed, augment=augment), 10)
        for seed in (1, 1, 2)
    )
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert (first["label"] != other["label"]).any()


@pytest.mark.parametrize("augment", [False, True])
def test_batch_size_and_processes_do_not_change_the_examples(augment):
    digits = data.load("digits").train
    one = take(data.train_batches(digits, 8, seed=3, augment=augment), 50)
    larger = take(data.train_batches(digits, 40, seed=3, augment=augment), 10)
    parts = [
        take(
            data.train_batches(
                digits, 8, seed=3, augment=augment, process_index=i, process_count=2
            ),
            50,
        )
        for i in range(2)
    ]
    for name, values in one.items():
        np.testing.assert_array_equal(values, larger[name])
        np.testing.assert_array_equal(values[0::2], parts[0][name])
        np.testing.assert_array_equal(values[1::2], parts[1][name])


@pytest.mark.parametrize("augment", [False, True])
def test_a_saved_position_is_continued(split, augment):
    batches = data.train_batches(split, 3, seed=0, augment=augment)
    take(batches, 5)
    position = batches.get_state()
    expected = take(batches, 7)

    continued = data.train_batches(split, 3, seed=0, augment=augment)
    continued.set_state(position)
    for name, values in take(continued, 7).items():
        np.testing.assert_array_equal(values, expected[name])


def test_augmented_images_are_crops_and_flips_of_the_padded_ones():
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (6, 8, 10, 3)).astype(np.uint8)
    split = data.Split(images, np.arange(6, dtype=np.int32))
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
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

    batch = take(data.train_batches(split, 50, seed=0, augment=True), 40)
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


@pytest.mark.parametrize("process_count", [1, 2])
@pytest.mark.parametrize("batch_size", [2, 4, 10, 16])
def test_evaluation_counts_every_example_once(split, batch_size, process_count):
    counts = np.zeros(10)
    number_of_batches = set()
    for process_index in range(process_count):
        batches = list(
            data.eval_batches(
                split,
                batch_size,
                process_index=process_index,
                process_count=process_count,
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
def test_processes_must_share_a_batch_equally(split, batch_size):
    message = rf"positive multiple of the 2 process\(es\), got {batch_size}"
    with pytest.raises(ValueError, match=message):
        data.train_batches(split, batch_size, seed=0, process_count=2)
    with pytest.raises(ValueError, match=message):
        next(data.eval_batches(split, batch_size, process_count=2))


def test_a_dataset_needs_a_folder(monkeypatch):
    monkeypatch.delenv("SPARSEJAX_DATA_DIR", raising=False)
    with pytest.raises(ValueError, match="'mnist' needs the folder .*SPARSEJAX_DATA_D"):
        data.load("mnist")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tfds, at its import
def test_a_dataset_that_is_not_prepared_says_how(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEJAX_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError) as error:
        data.load("mnist")
    message = str(error.value)
    assert f"no '{tmp_path}/mnist/" in message
    assert (
        f"tfds.builder('mnist', data_dir='{tmp_path}', file_format='array_record')"
        ".download_and_prepare()"
    ) in message
    assert "SPARSEJAX_DATA_DIR" in message
    assert not list(tmp_path.iterdir())

    with pytest.raises(ValueError, match="'no_such_images' is neither 'digits' nor"):
        data.load("no_such_images")


# Counts and channel means (of pixels in [0, 1]) as they are published.
@pytest.mark.parametrize(
    ("name", "sizes", "shape", "classes", "mean", "std"),
    [
        ("fashion_mnist", (60_000, 10_000), (28, 28, 1), 10, [0.2860], [0.3530]),
        pytest.param(
            "cifar10",
            (50_000, 10_000),
            (32, 32, 3),
            10,
            [0.4914, 0.4822, 0.4465],
            [0.2470, 0.2435, 0.2616],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_tfds_datasets(data_dir, name, sizes, shape, classes, mean, std):
    dataset = data.load(name, str(data_dir))
    assert (len(dataset.train), len(dataset.test)) == sizes
    assert dataset.image_shape == shape
    assert dataset.num_classes == classes
    np.testing.assert_allclose(dataset.mean / 255, mean, atol=1e-4)
    np.testing.assert_allclose(dataset.std / 255, std, atol=1e-4)
    assert (np.bincount(dataset.test.labels) == sizes[1] // classes).all()
    batch = next(data.train_batches(dataset.train, 128, seed=0, augment=True))
    assert batch["image"].shape == (128, *shape)
    assert data.load(name, str(data_dir)) is dataset


def test_tfds_dataset_with_another_number_of_classes(data_dir):
    folder = data_dir / "samples"
    if not folder.is_dir():
        pytest.skip(f"{folder} with a sample of cifar100 is not there")
    dataset = data.load("cifar100", str(folder))
    assert dataset.num_classes == 100
    assert set(dataset.train.labels) == set(range(100))
