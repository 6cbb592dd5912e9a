"""Bad input is refused with what was required, what came, for which path, and why."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import sparse_optax
from sparsejax.masks import Layout

SGD = optax.sgd(0.1)
PARAMS = {
    "embed": {"embedding": jnp.ones((5, 4))},
    "fc": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)},
}
OTHER_SHAPE = PARAMS | {"fc": {"kernel": jnp.ones((8, 5)), "bias": jnp.ones(4)}}
OTHER_PATHS = {"conv": {"kernel": jnp.ones((8, 4))}}
MASK = jnp.ones((8, 4), bool)
RANDOM = ["rigl", "set", "static", "magnitude"]
DYNAMIC = ["rigl", "set"]
STARTED = ["rigl", "set", "static"]  # from masks that are drawn, or given
TIMED = ["rigl", "set", "magnitude"]


def kept(value):
    return lambda shapes, sparsity: dict.fromkeys(shapes, value)


def factory(name, **options):
    return getattr(sparse_optax, name)(SGD, **{"sparsity": 0.5, **options})


def refuses(error, *parts):
    """Expect an error whose message has all these parts, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, parts)))


# Arguments, when the factory is called

STEPS = "counts steps and must be an integer of at least"
ARGUMENTS = [
    *[
        (RANDOM, dict(sparsity=s), ValueError, "(sparsity=...)", "in [0, 1)", str(s))
        for s in (1.0, -0.1, float("nan"), True, [0.5])
    ],
    (RANDOM, dict(sparsity="0.9"), ValueError, "in [0, 1)", "'0.9'"),
    (RANDOM, dict(distribution="erdos"), ValueError, "['erk', 'uniform']", "'erdos'"),
    (RANDOM, dict(where="fc"), TypeError, "(where=...)", "a dict", "got str"),
    (RANDOM, dict(where={"fc": 1.5}), ValueError, "'fc'", "in [0, 1)", "1.5"),
    (RANDOM, dict(where={"(": 0.5}), ValueError, "regular", "'('", "unterminated"),
    (RANDOM, dict(where={3: 0.5}), ValueError, "(where=...)", "regular", "got 3"),
    (RANDOM, dict(layout={"(": Layout()}), ValueError, "(layout=...)", "regular"),
    (RANDOM, dict(layout={"fc": "conv"}), TypeError, "'fc'", "Layout", "got str"),
    (RANDOM, dict(layout=Layout()), TypeError, "(layout=...)", "dict", "got Layout"),
    *[
        (RANDOM, dict(key=key), TypeError, "(key=...) must be one PRNG key", "jax.vmap")
        for key in (
            7,
            jax.random.split(jax.random.key(0)),
            jnp.zeros((8, 2), jnp.uint32),
            jnp.uint32(7),
        )
    ],
    (TIMED, dict(start_at=-1), ValueError, "(start_at=...)", STEPS, "0, got -1"),
    (TIMED, dict(start_at=None), ValueError, "(start_at=...)", STEPS, "got None"),
    (TIMED, dict(update_every=0), ValueError, "(update_every=...)", STEPS, "1, got 0"),
    (TIMED, dict(update_every=2.5), ValueError, "(update_every=...)", STEPS, "got 2.5"),
    (TIMED, dict(stop_at="10"), ValueError, "(stop_at=...)", STEPS, "got '10'"),
    (TIMED, dict(stop_at=4, start_at=9), ValueError, "(stop_at=...)", "=9", "got 4"),
    *[
        (DYNAMIC, dict(drop_fraction=f), ValueError, "(drop_fraction=...)", "[0, 1]")
        for f in (1.5, -0.1, float("nan"), None, "0.3")
    ],
    (["rigl"], dict(accumulate=0), ValueError, "(accumulate=...)", "1", "got 0"),
    (["rigl"], dict(accumulate=101), ValueError, "update_every=100", "got 101"),
    (["rigl"], dict(accumulate=2.0), ValueError, "(accumulate=...)", "got 2.0"),
    (["magnitude"], dict(scope="all"), ValueError, '"layer" or "global"', "'all'"),
    (
        ["magnitude"],
        dict(scope="global", where={"fc": 0.3}),
        ValueError,
        'scope="global"',
        "use 0 or a predicate",
        "0.3",
    ),
    (STARTED, dict(sparsity=None), ValueError, "exactly one", "got neither"),
    (STARTED, dict(masks=PARAMS), ValueError, "exactly one", "got both"),
]


@pytest.mark.parametrize(
    ("name", "options", "error", "parts"),
    [
        (name, options, error, parts)
        for names, options, error, *parts in ARGUMENTS
        for name in names
    ],
)
def test_arguments(name, options, error, parts):
    names_the_factory = [] if "where" in options else [name]
    with refuses(error, *names_the_factory, *parts):
        factory(name, **options)


@pytest.mark.parametrize("name", RANDOM)
def test_the_first_argument(name):
    with refuses(
        TypeError, name, "must be an optax transformation", "float", "keyword"
    ):
        getattr(sparse_optax, name)(0.9, sparsity=0.5)
    with refuses(TypeError, name, "must be an optax transformation", "got function"):
        getattr(sparse_optax, name)(optax.sgd, sparsity=0.5)


@pytest.mark.parametrize("name", STARTED)
@pytest.mark.parametrize(
    ("masks", "error", "parts"),
    [
        ({}, ValueError, ["at least one mask"]),
        ({"fc": {"kernel": None}}, ValueError, ["at least one mask"]),
        ({"fc": {"kernel": jnp.ones((8, 4))}}, TypeError, ["fc/kernel", "float32"]),
        ({"fc": {"kernel": "all"}}, TypeError, ["fc/kernel", "bool array", "str"]),
    ],
)
def test_given_masks(name, masks, error, parts):
    with refuses(error, f"{name}(masks=...)", *parts):
        getattr(sparse_optax, name)(SGD, masks=masks)


@pytest.mark.parametrize("name", STARTED)
@pytest.mark.parametrize(
    "options", [dict(where={"fc": 0}), dict(distribution="uniform")]
)
def test_given_masks_take_no_argument_of_random_ones(name, options):
    with refuses(ValueError, f"{name}(masks=...)", "Leave them out"):
        getattr(sparse_optax, name)(SGD, masks={"fc": {"kernel": MASK}}, **options)


# Parameters, at init

PATHS = "The paths are: embed/embedding, fc/kernel"
AT_INIT = [
    (dict(where={"nope": 0.5}), PARAMS, ValueError, "'nope'", "none", PATHS, "remove"),
    (dict(where={"bias": 0.5}), PARAMS, ValueError, "'bias'", "none", PATHS),
    (dict(where={"fc": 0}), PARAMS, ValueError, "Nothing is to be sparse", "fc/kernel"),
    (dict(where=lambda *_: False), PARAMS, ValueError, "Nothing", "predicate"),
    (dict(layout={"nope": Layout()}), PARAMS, ValueError, "layout", "'nope'", "fc/"),
    (
        dict(layout={"fc/kernel": Layout(outputs=(2,))}),
        PARAMS,
        ValueError,
        "fc/kernel",
        "outputs=(2,)",
        "array of 2 dimensions",
    ),
    (dict(distribution=kept(2.5)), PARAMS, ValueError, "integer", "fc/kernel", "2.5"),
    (dict(distribution=kept(99)), PARAMS, ValueError, "and 32", "fc/kernel", "got 99"),
    (dict(distribution=lambda *_: {}), PARAMS, ValueError, "fc/kernel", "got None"),
    (dict(distribution=lambda *_: None), PARAMS, TypeError, "dict", "got NoneType"),
    ({}, {"fc": {"bias": jnp.ones(4)}}, ValueError, "Nothing", "leaves", "fc/bias"),
    ({}, {}, ValueError, "Nothing is to be sparse"),
    ({}, {"fc": np.ones((3, 3))}, TypeError, "fc", "float32", "got float64", "where="),
    ({}, {"fc": jnp.ones((3, 3), jnp.int32)}, ValueError, "Nothing", "fc"),
]


@pytest.mark.parametrize("name", ["rigl", "magnitude"])
@pytest.mark.parametrize(
    ("options", "params", "error", "parts"), [(*x[:3], x[3:]) for x in AT_INIT]
)
def test_parameters(name, options, params, error, parts):
    tx = factory(name, **options)
    with refuses(error, *parts):
        tx.init(params)


@pytest.mark.parametrize("name", STARTED)
@pytest.mark.parametrize(
    ("path", "mask", "error", "parts"),
    [
        ("conv", MASK, ValueError, ["conv/kernel", "no such parameter", "fc/kernel"]),
        ("fc", MASK.T, ValueError, ["fc/kernel", "(8, 4)", "got (4, 8)"]),
        ("step", MASK, TypeError, ["step/kernel", "floating-point", "got int32"]),
    ],
)
def test_given_masks_of_other_parameters(name, path, mask, error, parts):
    tx = getattr(sparse_optax, name)(SGD, masks={path: {"kernel": mask}})
    with refuses(error, f"{name}(masks=...)", *parts):
        tx.init(PARAMS | {"step": {"kernel": jnp.ones((8, 4), jnp.int32)}})


# Trees, at update

ANOTHER = "belong to another model"


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("grads", "params", "error", "parts"),
    [
        (PARAMS, None, ValueError, ["needs the parameters", "tx.update(updates, "]),
        (
            OTHER_SHAPE,
            OTHER_SHAPE,
            ValueError,
            ["fc/kernel", "(8, 5)", "(8, 4)", ANOTHER],
        ),
        (OTHER_PATHS, OTHER_PATHS, ValueError, ["fc/kernel", ANOTHER, "conv/kernel"]),
        (
            OTHER_SHAPE,
            PARAMS,
            ValueError,
            ["(updates)", "(8, 4)", "fc/kernel", "(8, 5)"],
        ),
        (
            OTHER_PATHS,
            PARAMS,
            ValueError,
            ["(updates)", "(8, 4)", "fc/kernel", "got nothing"],
        ),
        (PARAMS | OTHER_PATHS, PARAMS | OTHER_PATHS, ValueError, ["conv/kernel"]),
    ],
)
def test_trees(grads, params, error, parts, jit):
    tx = factory("rigl")
    with refuses(error, "rigl", *parts):
        jit(tx.update)(grads, tx.init(PARAMS), params)


def test_growth_by_gradient_as_the_last_link_needs_the_gradient():
    tx = optax.chain(SGD, sparse_optax.rigl(sparsity=0.5))
    with refuses(TypeError, "rigl", "grad=grads", "or use rigl(inner, ...)"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("grad", [OTHER_SHAPE, OTHER_PATHS])
def test_the_gradient_of_the_last_link_fits(grad):
    tx = optax.chain(SGD, sparse_optax.rigl(sparsity=0.5))
    with refuses(ValueError, "rigl", "(grad=...)", "(8, 4) for fc/kernel, got"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, grad=grad)


@pytest.mark.parametrize("state", [SGD.init(PARAMS), {"count": 0}])
def test_the_state_is_of_a_sparse_transformation(state):
    with refuses(TypeError, "rigl.update", "SparseState", type(state).__name__):
        factory("rigl").update(PARAMS, state, PARAMS)


def test_the_state_has_the_gradients_that_are_accumulated():
    state = factory("rigl").init(PARAMS)
    with refuses(ValueError, "rigl", "accumulate"):
        factory("rigl", accumulate=2).update(PARAMS, state, PARAMS)


# Masks and states


def test_masks_of_a_dense_optimizer():
    state = optax.adam(0.1).init(PARAMS)
    for f in (
        lambda: sparse_optax.get_masks(state),
        lambda: sparse_optax.apply_masks(PARAMS, state),
    ):
        with refuses(ValueError, "must come from a sparse_optax", "tuple"):
            f()


def test_masks_of_two_transformations_on_one_leaf():
    tx = optax.chain(factory("rigl"), sparse_optax.static(sparsity=0.5))
    with refuses(ValueError, "two sparse transformations", "fc/kernel", "use one"):
        sparse_optax.get_masks(tx.init(PARAMS))


@pytest.mark.parametrize(
    ("params", "parts"),
    [
        (OTHER_SHAPE, ["fc/kernel", "(8, 5)", "got (8, 4)", ANOTHER]),
        (OTHER_PATHS, ["fc/kernel", "no such parameter", ANOTHER, "conv/kernel"]),
    ],
)
def test_masks_of_another_model(params, parts):
    state = factory("rigl").init(PARAMS)
    with refuses(ValueError, "apply_masks", *parts):
        sparse_optax.apply_masks(params, state)
    with refuses(ValueError, "reinitialize", *parts):
        sparse_optax.reinitialize(params, state, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        (dict(variant="he"), ValueError, ["variant", '"variance" or "std"', "'he'"]),
        (
            dict(layout={"nope": Layout()}),
            ValueError,
            ["layout", "'nope'", "fc/kernel"],
        ),
        (dict(key=7), TypeError, ["reinitialize(key=...)", "PRNG key", "7"]),
    ],
)
def test_reinitialize(options, error, parts):
    state = factory("rigl").init(PARAMS)
    with refuses(error, *parts):
        options = dict(key=jax.random.key(0)) | options
        sparse_optax.reinitialize(PARAMS, state, **options)
