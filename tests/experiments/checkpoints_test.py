"""Checkpoints that are damaged, foreign, or the best: nothing is ever lost."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.checkpoints import FOLDER, Checkpoints, Notes

STATE = {
    "model": {"kernel": jnp.arange(600.0), "on": jnp.arange(600) % 2 == 0},
    "key": jax.random.key(3),
}
ABSTRACT = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE
)


def state(step):
    return jax.tree.map(lambda x: x + step if x.dtype == jnp.float32 else x, STATE)


def notes(step, best=0):
    best = {"step": step, "test/accuracy": best} if best else {}
    return Notes({"examples": 8 * step}, [{"loss": 0.1 * step}], best)


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoints of steps 1, 2 and 3."""
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), notes(step))
    return tmp_path


def restore(folder, step=None, abstract=ABSTRACT):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(abstract, step)


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def check(restored, step):
    found, arrays, told = restored
    assert (found, told) == (step, notes(step))
    assert arrays["key"] == STATE["key"]
    arrays, expected = arrays["model"], state(step)["model"]
    jax.tree.map(np.testing.assert_array_equal, arrays, expected)


def test_the_last_one_is_restored_or_the_one_that_is_asked_for(saved):
    check(restore(saved), 3)
    check(restore(saved, 1), 1)


def test_nothing_is_restored_where_nothing_was_saved(tmp_path):
    assert restore(tmp_path) is None
    with pytest.raises(ValueError, match="no checkpoint of step 2; it has those of no"):
        restore(tmp_path, 2)


def test_a_step_that_is_missing_is_named_with_those_that_are_there(saved):
    with pytest.raises(ValueError, match="no checkpoint of step 4; .* of 1, 2, 3"):
        restore(saved, 4)


def largest(checkpoint):
    """Return the file that has the arrays."""
    files = [path for path in checkpoint.rglob("d/*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def truncate(checkpoint):
    """Cut a file in half, as a full disk does."""
    path = largest(checkpoint)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(checkpoint):
    """Change bits in the middle of a file, as a bad disk does."""
    path = largest(checkpoint)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    for place in range(middle, middle + 16):
        content[place] ^= 255
    path.write_bytes(bytes(content))


def lose_arrays(checkpoint):
    shutil.rmtree(checkpoint / "state")


def lose_metadata(checkpoint):
    (checkpoint / "_CHECKPOINT_METADATA").unlink()


@pytest.mark.parametrize("damage", [truncate, flip, lose_arrays, lose_metadata])
@pytest.mark.usefixtures("abandoned_reads")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_one_is_refused_and_the_last_good_one_offered(saved, damage):
    damage(saved / FOLDER / "3")
    damage(saved / FOLDER / "2")
    before = contents(saved)
    with pytest.raises(ValueError, match="checkpoints/3 cannot be restored") as error:
        restore(saved)
    assert "That of step 1 is in order" in str(error.value)
    assert "--resume_from=1" in str(error.value)
    assert contents(saved) == before
    check(restore(saved, 1), 1)


def test_a_foreign_one_is_refused_and_what_differs_is_named(saved):
    before = contents(saved)
    kernel = jax.ShapeDtypeStruct((5,), np.int32)
    other = ABSTRACT | {"model": ABSTRACT["model"] | {"kernel": kernel}}
    with pytest.raises(ValueError, match="No earlier one can be restored") as error:
        restore(saved, abstract=other)
    assert "model/kernel must be int32[5], and it has float32[600]" in str(error.value)
    more = ABSTRACT | {"optimizer": ABSTRACT["model"]}
    with pytest.raises(ValueError, match="optimizer/kernel .* it has nothing"):
        restore(saved, abstract=more)
    assert contents(saved) == before


def test_later_ones_are_set_aside_and_not_deleted(saved):
    later = contents(saved / FOLDER / "3")
    for _ in range(2):
        with Checkpoints(saved, keep=3) as checkpoints:
            checkpoints.set_aside_after(2)
            assert checkpoints.steps == [1, 2]
            checkpoints.save(3, state(3), notes(3))
    assert sorted(p.name for p in (saved / f"{FOLDER}_set_aside").iterdir()) == [
        "3.0",
        "3.1",
    ]
    aside = contents(saved / f"{FOLDER}_set_aside" / "3.0")
    assert sorted(later.values()) == sorted(aside.values())
    check(restore(saved), 3)


def test_the_best_one_stays_beside_the_last(tmp_path):
    accuracies = {1: 0.3, 2: 0.9, 3: 0.0, 4: 0.0, 5: 0.0}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.best is None
        for step, accuracy in accuracies.items():
            checkpoints.save(step, state(step), notes(step, accuracy))
        assert checkpoints.best == 2
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.steps, checkpoints.best) == ([2, 4, 5], 2)


def test_a_step_is_saved_once(saved):
    with Checkpoints(saved, keep=3) as checkpoints:
        checkpoints.save(3, state(7), notes(7))
    check(restore(saved), 3)
