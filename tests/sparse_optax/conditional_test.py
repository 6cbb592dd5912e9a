import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from jax import lax

from sparsejax.sparse_optax._conditional import change_if

NAMES = ("pred", "first", "second", "threshold", "values")
SHAPES = dict(pred=(), first=(3,), second=(3,), threshold=(), values=(3,))
SIZES = (4, 3)

# The arguments that each vmap is over, the outermost vmap first.
LEVELS = [
    [NAMES],
    [("pred",)],
    [("first",)],
    [("pred", "second")],
    [("threshold", "values")],
    [("first", "second", "values")],
    [NAMES, NAMES],
    [("pred",), ("first", "values")],
    [("threshold",), ("pred",)],
    [("pred", "second"), ("pred",)],
    [("first",), ("threshold",)],
]


def change(masks, operands):
    (first, second), (threshold, values) = masks, operands
    flip = lambda _, mask: ~mask & (values > threshold)
    return [lax.fori_loop(0, 3, flip, first), ~second]


def conditional(pred, first, second, threshold, values):
    return change_if(pred, change, [first, second], (threshold, values))


def expected(pred, first, second, threshold, values):
    if not pred:
        return first, second
    for _ in range(3):
        first = ~first & (values > threshold)
    return first, ~second


def draw(levels):
    """Draw arguments with the leading axes that the levels map over."""
    rng = np.random.default_rng(0)
    arguments = {}
    for name in NAMES:
        sizes = [SIZES[i] for i, names in enumerate(levels) if name in names]
        numbers = rng.random((*sizes, *SHAPES[name]), np.float32)
        arguments[name] = numbers if name in ("threshold", "values") else numbers < 0.5
    return arguments


def mapped(levels):
    function = conditional
    for names in reversed(levels):
        axes = [0 if name in names else None for name in NAMES]
        function = jax.vmap(function, in_axes=axes)
    return function


@pytest.mark.parametrize("pred", [True, False])
@pytest.mark.parametrize("way", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_an_unbatched_predicate_chooses(pred, way):
    arguments = draw([]) | {"pred": jnp.asarray(pred)}
    result = way(conditional)(*arguments.values())
    jax.tree.map(
        np.testing.assert_array_equal, result, [*expected(*arguments.values())]
    )


@pytest.mark.parametrize("levels", LEVELS)
def test_each_element_of_a_batch_chooses_for_itself(levels):
    arguments = draw(levels)
    result = jax.jit(mapped(levels))(*arguments.values())
    for index in np.ndindex(*SIZES[: len(levels)]):
        mine = []
        for name, values in arguments.items():
            at = tuple(index[i] for i, names in enumerate(levels) if name in names)
            mine.append(values[at])
        for actual, wanted in zip(result, expected(*mine), strict=True):
            np.testing.assert_array_equal(actual[index], wanted)


@pytest.mark.parametrize("levels", [[], *LEVELS])
def test_the_change_stays_in_the_conditional(levels):
    arguments = draw(levels).values()
    outside, inside = jaxprs.outside_and_inside(mapped(levels), *arguments)
    assert "cond" in outside and "scan" not in outside
    assert "scan" in inside


def test_the_compiled_program_branches():
    arguments = draw([NAMES]).values()
    compiled = jax.jit(mapped([NAMES])).lower(*arguments).compile().as_text()
    entry = compiled[compiled.index("ENTRY") :]
    assert " conditional(" in entry and " while(" not in entry
    assert " while(" in compiled


@pytest.mark.parametrize("preds", [[False] * 4, [False, True, False, False]])
def test_nothing_runs_where_no_element_asks_for_it(preds):
    calls = []

    def recorded(masks, values):
        jax.debug.callback(lambda: calls.append(None))
        return [mask ^ (values > 0) for mask in masks]

    def step(mask, pred_and_value):
        pred, value = pred_and_value
        (mask,) = change_if(pred, recorded, [mask], value)
        return mask, mask

    preds, masks, values = np.array(preds), np.zeros(4, bool), np.ones((2, 4))
    preds = np.stack([np.zeros_like(preds), preds])
    scan = lambda mask, pred, value: lax.scan(step, mask, (pred, value))[1]
    run = jax.jit(jax.vmap(scan, in_axes=(0, 1, 1), out_axes=1))
    history = run(masks, preds, values)
    jax.effects_barrier()
    np.testing.assert_array_equal(history, preds)
    assert bool(calls) == preds.any()
