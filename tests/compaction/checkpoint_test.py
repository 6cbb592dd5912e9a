import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import plans
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from sparsejax import compaction
from sparsejax.compaction import CompactionError, Plan, checkpoint, restore, save
from sparsejax.compaction.rebuild import rebuild
from sparsejax.masks.layout import named_leaves


class Net(nnx.Module):
    """Has all that is hard to store: no elements, bfloat16, random keys, lists."""

    def __init__(self, rngs, width=8, depth=2):
        self.conv = nnx.Conv(3, width, (3, 3), param_dtype=jnp.bfloat16, rngs=rngs)
        self.norm = nnx.GroupNorm(width, num_groups=4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.layers = nnx.List(
            nnx.Linear(width, width, use_bias=False, rngs=rngs) for _ in range(depth)
        )

    def __call__(self, x):
        x = self.drop(self.norm(self.conv(x)))
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


GONE, ALL = [1, 3, 5, 7], [0, 1, 2, 3, 4, 5, 6, 7]
REMOVED = {
    "conv/kernel": {3: GONE},
    "conv/bias": {0: GONE},
    "norm/scale": {0: GONE},
    "norm/bias": {0: GONE},
    "layers/0/kernel": {0: GONE, 1: ALL},
    "layers/1/kernel": {0: ALL},
}
PLAN = dict(
    feature_groups={"conv/kernel": 1},
    factors={("norm/scale", 0): (4, 1), ("norm/bias", 0): (4, 1)},
    folds={"layers/1/kernel": np.linspace(0, 1, 8, dtype=np.float32)},
)


def architecture(**sizes):
    return nnx.eval_shape(lambda: Net(nnx.Rngs(0), **sizes))


@pytest.fixture(scope="module")
def small_and_plan():
    full = plans.masked(plans.drawn(Net), REMOVED)
    plan = plans.plan_for(full, REMOVED, **PLAN)
    small = rebuild(full, plan)
    small.norm.scale[...] *= 1.5  # as if trained further
    return small, plan


@pytest.fixture
def saved(tmp_path, small_and_plan):
    save(tmp_path / "small", *small_and_plan)
    return tmp_path / "small"


def assert_same(found, expected):
    assert nnx.split(found)[0] == nnx.split(expected)[0]
    found, expected = (named_leaves(nnx.state(model)) for model in (found, expected))
    assert list(found) == list(expected)
    for path, leaf in expected.items():
        assert isinstance(found[path], jax.Array) and found[path].dtype == leaf.dtype
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, found[path] = map(jax.random.key_data, (leaf, found[path]))
        np.testing.assert_array_equal(found[path], leaf)


def test_what_is_saved_is_restored(saved, small_and_plan):
    small, _ = small_and_plan
    full = plans.drawn(Net, seed=5)
    before = np.array(full.norm.scale[...])
    for model in (architecture(), full):
        restored = restore(saved, model)
        assert_same(restored, small)
        x = jnp.ones((1, 4, 4, 3))
        np.testing.assert_array_equal(restored(x), small(x))
    assert restored.layers[0].kernel.shape == (4, 0)
    assert restored.norm.full_group_size == 2
    np.testing.assert_array_equal(full.norm.scale[...], before)


def test_a_report_is_as_good_as_its_plan(tmp_path, monkeypatch, small_and_plan):
    class Report:
        plan = small_and_plan[1]

    monkeypatch.chdir(tmp_path)
    save("relative", small_and_plan[0], Report())
    assert_same(restore("relative", architecture()), small_and_plan[0])
    assert [path.name for path in tmp_path.iterdir()] == ["relative"]


def test_parameters_are_placed_as_the_architecture_is_sharded(saved, small_and_plan):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    model = architecture()
    split = NamedSharding(mesh, PartitionSpec("d"))
    struct = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=split)
    model.norm.scale.set_value(struct)
    restored = restore(saved, model)
    assert_same(restored, small_and_plan[0])
    assert restored.norm.scale.sharding.is_equivalent_to(split, 1)
    assert restored.norm.bias.devices() == {jax.devices()[0]}


def test_nothing_is_overwritten_unasked(saved, small_and_plan):
    small, plan = small_and_plan
    other = nnx.clone(small)
    other.norm.bias[...] += 1
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save(saved, other, plan)
    assert_same(restore(saved, architecture()), small)
    save(saved, other, plan, overwrite=True)
    assert_same(restore(saved, architecture()), other)


def test_only_plans_are_saved(tmp_path, small_and_plan):
    with pytest.raises(CompactionError, match="report of compact.* got dict"):
        save(tmp_path / "x", small_and_plan[0], {})
    assert not (tmp_path / "x").exists()


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nowhere"):
        restore(tmp_path / "nowhere", architecture())


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"width": 4}, r"another model: conv/bias has the shape \(4,\)"),
        ({"depth": 1}, "another model: it has a parameter layers/1/kernel"),
        ({"depth": 3}, r"layers/2/kernel .* missing there and .*\[8, 8\], 'float32'"),
    ],
)
def test_another_architecture_is_refused(saved, sizes, reason):
    with pytest.raises(CompactionError, match=f"small: .*{reason}"):
        restore(saved, architecture(**sizes))


def test_another_dtype_is_refused(saved):
    model = architecture()
    model.norm.scale.set_value(jax.ShapeDtypeStruct((8,), jnp.float16))
    reason = r"norm/scale .*\[4\], 'float32'\] there and \[\[4\], 'float16'\] in the"
    with pytest.raises(CompactionError, match=reason):
        restore(saved, model)


def foreign(folder: pathlib.Path):
    shutil.rmtree(folder)
    ocp.save_checkpointables(folder, {"model": {"w": jnp.ones(3)}})


def empty(folder: pathlib.Path):
    shutil.rmtree(folder)
    folder.mkdir()


def a_file(folder: pathlib.Path):
    shutil.rmtree(folder)
    folder.write_text("something else")


def without_metadata(folder: pathlib.Path):
    (folder / "_CHECKPOINT_METADATA").unlink()


def without_arrays(folder: pathlib.Path):
    shutil.rmtree(folder / "model")


def without_some_array(folder: pathlib.Path):
    files = [path for path in (folder / "model").rglob("*") if path.is_file()]
    max(files, key=lambda path: path.stat().st_size).unlink()


def cut_short(folder: pathlib.Path):
    for path in (folder / "model").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    "harm",
    [
        foreign,
        empty,
        a_file,
        without_metadata,
        without_arrays,
        without_some_array,
        cut_short,
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_is_no_whole_checkpoint_is_refused(saved, harm):
    harm(saved)
    with pytest.raises(CompactionError, match="small: .*damaged"):
        restore(saved, architecture())


def test_the_plan_itself_survives(saved, small_and_plan):
    _, plan = small_and_plan
    found = checkpoint._from_json(checkpoint._read_about(str(saved))["plan"])
    assert isinstance(found, Plan)
    assert found.feature_groups == plan.feature_groups and found.factors == plan.factors
    for path, keep in plan.keep.items():
        for ours, theirs in zip(keep, found.keep[path], strict=True):
            np.testing.assert_equal(theirs, ours)
    (fold,) = found.folds.values()
    np.testing.assert_array_equal(fold, *plan.folds.values())
    assert fold.dtype == np.float32


def test_one_compacted_model_is_the_architecture_of_the_next(tmp_path):
    class Mlp(nnx.Module):
        def __init__(self, rngs):
            self.fc1 = nnx.Linear(3, 8, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.fc2 = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.fc2(self.norm(self.fc1(x)))

    x = jnp.ones((2, 3))
    small, architecture = plans.drawn(Mlp), nnx.eval_shape(lambda: Mlp(nnx.Rngs(0)))
    for turn, gone in enumerate(([0, 3], [2])):
        masked = compaction.channel_groups(small, x).zero(small, {"fc1": gone})
        small, report = compaction.compact(masked, x)
        save(tmp_path / str(turn), small, report)
        architecture = restore(tmp_path / str(turn), architecture)
    assert_same(architecture, small)
    assert small.norm.full_features == 8 and small.norm.num_features == 5
