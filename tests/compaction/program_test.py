import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sparsejax.compaction.program import flatten, trace
from sparsejax.compaction.rules.reshape import factor_groups


@jax.custom_vjp
def doubled(x):
    return x * 2


doubled.defvjp(lambda x: (doubled(x), None), lambda _, g: (g,))

CALLS = {
    "jit": jax.jit(jnp.sin),
    "remat": jax.checkpoint(jnp.sin),
    "custom_jvp": jax.nn.relu,
    "custom_vjp": doubled,
    "composite": lambda x: lax.composite(jnp.sin, "my.sine")(x),
    "nested": jax.jit(lambda x: jax.checkpoint(jax.jit(doubled))(x)),
}


@pytest.mark.parametrize("fn", CALLS.values(), ids=CALLS)
def test_calls_are_inlined(fn):
    program = flatten(jax.make_jaxpr(fn)(jnp.ones(3)))
    assert {equation.name for equation in program.walk()} <= {"sin", "max", "mul"}
    assert len(program.equations) == 1


def test_loops_and_branches_keep_their_bodies():
    def fn(x):
        x, _ = lax.scan(lambda c, _: (jnp.sin(c), None), x, None, length=3)
        x = lax.while_loop(lambda c: c[0] < 3, lambda c: c + 1, x)
        return lax.cond(x[0] > 0, jnp.cos, jnp.tanh, x)

    program = flatten(jax.make_jaxpr(fn)(jnp.ones(3)))
    bodies = {e.name: len(e.bodies) for e in program.equations if e.bodies}
    assert bodies == {"scan": 1, "while": 2, "cond": 2}
    names = [equation.name for equation in program.walk()]
    assert names.index("sin") < names.index("scan")
    assert {"cos", "tanh", "lt"} <= set(names)


def test_parameters_have_their_paths_and_constants_are_told_apart():
    captured = np.arange(3.0, dtype=np.float32)
    params = {"b": jnp.ones(3), "a": {"kernel": jnp.ones((3, 2))}}
    fn = lambda p, x: (x + p["b"] + jnp.asarray(captured)) @ p["a"]["kernel"]
    traced = trace(fn, params, jnp.ones(3))
    assert traced.paths == ("a/kernel", "b", None)
    assert traced.parameters["a/kernel"].shape == (3, 2)
    assert [np.shape(c) for c in traced.program.constants.values()] == [(3,)]


def test_the_source_is_the_users_line():
    def fn(x):
        return jnp.sort(x)  # the only line

    line = fn.__code__.co_firstlineno + 1
    program = flatten(jax.make_jaxpr(fn)(jnp.ones(3)))
    (sort,) = (e for e in program.walk() if e.name == "sort")
    assert str(sort) == f"primitive 'sort' (program_test.py:{line})"


@pytest.mark.parametrize(
    ("before", "after", "groups"),
    [
        ((2, 6), (2, 2, 3), [([0], [0]), ([1], [1, 2])]),
        ((2, 3, 4), (6, 4), [([0, 1], [0]), ([2], [1])]),
        ((4, 6), (6, 4), [([0, 1], [0, 1])]),
        ((1, 5, 1), (5,), [([1], [0])]),
        ((1, 1), (), []),
        ((2, 1, 6), (2, 2, 1, 3), [([0], [0]), ([2], [1, 3])]),
    ],
)
def test_reshapes_fall_into_the_shortest_runs(before, after, groups):
    assert factor_groups(before, after) == groups


def test_a_symbolic_batch_is_a_run_of_its_own():
    (b,) = jax.export.symbolic_shape("b")
    assert factor_groups((b, 4, 6), (b, 24)) == [([0], [0]), ([1, 2], [1])]
    assert factor_groups((b, 4, 6), (4 * b, 6)) == [([0, 1], [0]), ([2], [1])]
