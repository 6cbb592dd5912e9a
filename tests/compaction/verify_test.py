import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax import compaction
from sparsejax.compaction.program import flatten
from sparsejax.compaction.subjects import Subject
from sparsejax.compaction.verify import another_batch, compare, drift, tolerance


def subject(fn):
    return Subject(lambda arrays, *inputs: fn(*inputs), {}, dict)


def program(fn, *inputs):
    return flatten(jax.make_jaxpr(fn)(*inputs))


def test_a_mean_over_fewer_channels_is_named():
    normed = lambda x: x / jnp.mean(x, -1, keepdims=True)
    found = drift(program(normed, jnp.ones((2, 8))), program(normed, jnp.ones((2, 6))))
    line = normed.__code__.co_firstlineno
    assert found == [
        f"'div' (verify_test.py:{line}) computes with [6.0], not with [8.0]"
    ]


def test_moving_entries_is_no_drift():
    flat = lambda x: jnp.tanh(x.reshape(x.shape[0], -1)[:, ::2])
    assert (
        drift(program(flat, jnp.ones((2, 2, 4))), program(flat, jnp.ones((2, 2, 2))))
        == []
    )


def test_another_batch_has_one_more_example_where_the_function_takes_it():
    (x, ids), (y,) = (
        another_batch(subject(lambda *a: a), (jnp.ones((2, 3)), jnp.array([5, 7]))),
        another_batch(subject(lambda a: a.reshape(2, 6)), (jnp.ones((3, 4)),)),
    )
    assert x.shape == (3, 3) and ids.shape == (3,) and y.shape == (3, 4)
    assert set(ids.tolist()) <= {5, 7}
    assert np.std(x) > 0.1


def test_infinite_outputs_are_refused():
    with pytest.raises(compaction.CompactionError, match="not finite"):
        compare(subject(jnp.log), subject(jnp.log), (-jnp.ones(3),))


def test_the_tolerance_is_that_of_the_roughest_dtype():
    rough = program(lambda x: (x.astype(jnp.bfloat16) * 2).astype(x.dtype), jnp.ones(2))
    assert tolerance(rough) > tolerance(program(lambda x: x * 2, jnp.ones(2)))


class Scaled(nnx.Module):
    """It divides by a width that it stores."""

    def __init__(self, rngs):
        self.first, self.second = (
            nnx.Linear(4, 8, rngs=rngs),
            nnx.Linear(8, 2, rngs=rngs),
        )

    def __call__(self, x):
        x = self.first(x)
        return self.second(x * x / jnp.sum(x * x, -1, keepdims=True) * x.shape[-1])


def test_a_module_that_computes_something_else_is_refused_with_the_reason():
    model = Scaled(nnx.Rngs(0))
    report = compaction.channel_groups(model, jnp.ones((1, 4)))
    masked = report.zero(model, {"first": [0, 1]})
    with pytest.raises(compaction.CompactionError) as raised:
        compaction.compact(masked, jnp.ones((1, 4)))
    assert "computes with [6.0], not with [8.0]" in str(raised.value)
    assert "verify_test.py" in str(raised.value)
    small, report = compaction.compact(masked, jnp.ones((1, 4)), backend="replay")
    assert report.max_error < 1e-5 * report.scale
    unchecked, report = compaction.compact(masked, jnp.ones((1, 4)), verify=False)
    assert report.max_error is None
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    assert np.abs(unchecked(x) - masked(x)).max() > 0.1


class Fixed(nnx.Module):
    """It reshapes to a width that it stores."""

    def __init__(self, rngs):
        self.first, self.second = (
            nnx.Linear(4, 8, rngs=rngs),
            nnx.Linear(8, 2, rngs=rngs),
        )

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x).reshape(-1, 2, 4)).reshape(-1, 8))


def test_a_module_that_writes_sizes_into_its_code_is_refused_with_the_place():
    model = Fixed(nnx.Rngs(0))
    report = compaction.channel_groups(model, jnp.ones((1, 4)))
    masked = report.zero(model, {"first": [0]})
    line = Fixed.__call__.__code__.co_firstlineno + 1
    with pytest.raises(compaction.CompactionError) as raised:
        compaction.compact(masked, jnp.ones((1, 4)))
    assert f"'reshape' (verify_test.py:{line})" in str(raised.value)
    small, _ = compaction.compact(masked, jnp.ones((1, 4)), backend="replay")
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    np.testing.assert_allclose(small(x), masked(x), atol=1e-6)
