import functools
import math
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import network_shapes
import numpy as np
import pytest
import srigl_oracle

from sparsejax import distributions
from sparsejax.masks import Layout, fan_in

NEURONS, INPUTS = 7, 12
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0, np.inf, -np.inf, np.nan, 1e-40, 6e4]

# Weights of NEURONS x INPUTS in several forms, each with its layout.
FORMS = {
    "dense": ((12, 7), Layout()),
    "conv": ((2, 2, 3, 7), Layout()),
    "depthwise": ((3, 4, 1, 7), Layout()),
    "query": ((12, 1, 7), Layout(outputs=(-2, -1), inputs=(-3,))),
    "out": ((3, 4, 7), Layout(outputs=(-1,), inputs=(-3, -2))),
    "torch": ((7, 3, 2, 2), Layout(outputs=(0,), inputs=(1,))),
}
compiled = jax.jit(fan_in.update, static_argnames=("layout", "revive", "official"))


@pytest.fixture(autouse=True, scope="module")
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


class Case(NamedTuple):
    """A layer before an update, [neurons, inputs], and what is asked of it."""

    mask: np.ndarray
    weight: np.ndarray
    gradient: np.ndarray
    n_drop: int
    budget: int
    threshold: int


@st.composite
def cases(draw, special=True):
    """Draw a layer whose live neurons have one fan-in: with ties, specials, or none."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["distinct", "ties", *["special"] * special]))
    budget = draw(st.integers(NEURONS, NEURONS * INPUTS))
    gamma = draw(st.sampled_from([0, 0.05, 0.3, 0.6, 0.95, 1, 3, 50]))
    fraction = draw(st.floats(0, 1))
    return make_case(rng, kind, budget, gamma, fraction)


def make_case(rng, kind, budget, gamma, fraction):
    shape = NEURONS, INPUTS
    live = NEURONS - rng.integers(0, 4)
    live = live if budget <= live * INPUTS else NEURONS
    mask = np.zeros(shape, bool)
    for row in rng.permutation(NEURONS)[:live]:
        mask[row, rng.permutation(INPUTS)[: budget // live]] = True

    def values():
        if kind == "ties":
            return rng.integers(-3, 4, shape) / 2
        # Neurons that differ, so that thresholds find some below them.
        spread = rng.normal(size=shape) * rng.gamma(0.5, size=(NEURONS, 1))
        if kind == "special":
            return np.where(rng.random(shape) < 0.2, rng.choice(SPECIAL, shape), spread)
        return spread

    weight, gradient = np.float32(values()), np.float32(values())
    n_drop = int(mask.sum() * fraction)
    threshold = srigl_oracle.threshold(gamma, budget // NEURONS)
    weight = np.where(mask, weight, np.float32(0))
    return Case(mask, weight, gradient, n_drop, budget, threshold)


def in_form(array, form):
    """Return a matrix [neurons, inputs] in the form of a weight."""
    shape, layout = FORMS[form]
    return np.asarray(layout.from_matrix(jnp.asarray(array), shape))


def as_matrix(array, form):
    return np.asarray(FORMS[form][1].to_matrix(jnp.asarray(array)))


def update(case, form="dense", dtype=jnp.float32, **options):
    """Update a mask by the compiled function; also give the case as it saw it."""
    weight, gradient = (
        jnp.asarray(in_form(x, form), dtype) for x in (case.weight, case.gradient)
    )
    result = compiled(
        in_form(case.mask, form),
        weight,
        gradient,
        case.n_drop,
        budget=case.budget,
        threshold=case.threshold,
        layout=FORMS[form][1],
        **options,
    )
    assert result.dtype == bool and result.shape == weight.shape
    seen = (as_matrix(x.astype(jnp.float32), form) for x in (weight, gradient))
    weight, gradient = seen
    return as_matrix(result, form), case._replace(weight=weight, gradient=gradient)


def index_of(form):
    """Number the positions of a weight as it lies in memory."""
    shape, _ = FORMS[form]
    return as_matrix(np.arange(math.prod(shape)).reshape(shape), form)


# Against the oracle


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
@hypothesis.given(case=cases())
def test_update_equals_the_oracle(dtype, case):
    result, case = update(case, dtype=dtype)
    expected = srigl_oracle.update(*case, index=index_of("dense"))
    np.testing.assert_array_equal(result, expected)


@hypothesis.given(case=cases())
def test_update_without_revival_equals_the_oracle(case):
    result, case = update(case, revive=False)
    expected = srigl_oracle.update(*case, index=index_of("dense"), revive=False)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "dense"])
@hypothesis.given(case=cases())
def test_neurons_are_what_the_layout_says(form, case):
    result, case = update(case, form)
    expected = srigl_oracle.update(*case, index=index_of(form))
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("form", ["dense", "conv"])
@hypothesis.given(case=cases(special=False))
def test_official_equals_the_oracle(form, case):
    result, case = update(case, form, official=True)
    if case.budget < case.mask.size:  # the code leaves dense layers out
        expected = srigl_oracle.official_update(*case)
        np.testing.assert_array_equal(result, expected)


def test_official_differs_where_more_is_ablated_than_dropped():
    rng = np.random.default_rng(0)
    flaws = 0
    for _ in range(50):
        case = make_case(rng, "distinct", 40, 0.95, 0.1)
        official, _ = update(case, official=True)
        faithful, _ = update(case)
        np.testing.assert_array_equal(official.any(1), faithful.any(1))
        flaws += (official != faithful).any()
    assert flaws > 5


def test_stacked_layers_are_layers_of_their_own():
    rng = np.random.default_rng(1)
    layers = [make_case(rng, "ties", budget, 0.5, 0.4) for budget in (20, 33, 61)]
    stack = [np.stack(arrays) for arrays in zip(*layers, strict=True)]
    mask, weight, gradient = (x.swapaxes(1, 2) for x in stack[:3])
    n_drop, budget, threshold = stack[3:]
    together = compiled(
        mask,
        weight,
        gradient,
        n_drop,
        budget=budget,
        threshold=threshold,
        layout=Layout(batch=(0,)),
    )
    for layer, result in zip(layers, together, strict=True):
        np.testing.assert_array_equal(result, update(layer)[0].T)


def test_masks_updated_together_are_those_updated_alone():
    rng = np.random.default_rng(2)
    forms = ["conv", "dense", "query"]
    layers = [make_case(rng, "ties", budget, 0.6, 0.4) for budget in (20, 33, 61)]
    columns = [
        [
            in_form(getattr(layer, name), form)
            for layer, form in zip(layers, forms, strict=True)
        ]
        for name in ("mask", "weight", "gradient")
    ]
    together = jax.jit(
        lambda *columns: fan_in.update_all(
            *columns,
            n_drop=lambda _: jnp.asarray([layer.n_drop for layer in layers]),
            budgets=[layer.budget for layer in layers],
            thresholds=[layer.threshold for layer in layers],
            layouts=[FORMS[form][1] for form in forms],
        )
    )(*columns)
    for layer, form, result in zip(layers, forms, together, strict=True):
        np.testing.assert_array_equal(as_matrix(result, form), update(layer, form)[0])


# Invariants


@hypothesis.given(case=cases(special=False))
def test_live_neurons_share_the_budget_evenly(case):
    result, _ = update(case)
    counts = result.sum(axis=1)
    (k,) = set(counts) - {0}
    live = int((counts > 0).sum())
    assert k * live <= case.budget < (k + 1) * live and k <= INPUTS
    assert live >= min(case.budget // INPUTS + 1, NEURONS)
    if case.threshold == 0:
        assert live == NEURONS


@hypothesis.given(case=cases(special=False))
def test_what_is_ablated_for_good_stays_so(case):
    result, _ = update(case, revive=False)
    assert not (result.any(axis=1) & ~case.mask.any(axis=1)).any()
    (k,) = set(result.sum(axis=1)) - {0}
    live = int(result.any(axis=1).sum())
    assert k * live <= case.budget < (k + 1) * live


@hypothesis.given(case=cases(special=False))
def test_a_threshold_of_one_ablates_neurons_without_a_salient_weight(case):
    result, case = update(case._replace(threshold=1))
    active = int(case.mask.sum())
    n_keep = min(active - case.n_drop, np.count_nonzero(case.weight))
    index = index_of("dense")
    salient = srigl_oracle.largest(abs(case.weight), index, n_keep, case.mask)
    everywhere = np.ones_like(case.mask)
    steep = abs(case.gradient)
    salient |= srigl_oracle.largest(steep, index, active - n_keep, everywhere)
    ranked = sorted(salient.sum(axis=1))
    if ranked[-1 - case.budget // INPUTS if case.budget < case.mask.size else 0]:
        np.testing.assert_array_equal(result.any(axis=1), salient.any(axis=1))
    else:
        assert result.any(axis=1).all()


def ablated_layer():
    """Make a layer of 6 weights whose last neuron is ablated and sees no gradient."""
    mask = np.zeros((NEURONS, INPUTS), bool)
    mask[:3, :2] = True
    weight = np.float32(mask) * np.arange(1, 1 + mask.size).reshape(mask.shape)
    gradient = np.zeros_like(weight, np.float32)
    gradient[:3, 2:5] = [[3, 2, 1]] * 3
    return Case(mask, np.float32(weight), gradient, 2, NEURONS, 1)


def test_a_steep_gradient_revives_a_neuron():
    case = ablated_layer()
    asleep, _ = update(case)
    assert not asleep[3:].any()
    case.gradient[6, 4] = 9
    awake, _ = update(case)
    assert awake[6].sum() == awake[0].sum() == NEURONS // 4
    assert awake[6, 4] and not awake[3:6].any()
    for_good, _ = update(case, revive=False)
    np.testing.assert_array_equal(for_good, asleep)


def test_with_too_few_salient_neurons_nothing_is_ablated():
    case = ablated_layer()
    everything = case._replace(budget=4 * INPUTS, threshold=50)
    assert update(everything)[0].sum(axis=1).tolist() == [4 * INPUTS // NEURONS] * 7


def test_the_threshold_falls_until_the_budget_fits():
    case = ablated_layer()
    # Two neurons must live: the threshold is what the second best has.
    result, _ = update(case._replace(budget=INPUTS + 2, threshold=50))
    assert result.any(axis=1).sum() >= 2


def test_rows_are_cut_to_their_largest_weights():
    mask = np.array([[True] * 4, [False] * 4])
    weight = np.float32([[1, 4, 2, 3], [0, 0, 0, 0]])
    gradient = np.float32([[0, 0, 0, 0], [0, 7, 0, 0]])
    case = mask.T, weight.T, gradient.T, 1
    new = compiled(*case, budget=4, threshold=1)
    assert new.T.astype(int).tolist() == [[0, 1, 0, 1], [1, 1, 0, 0]]
    official = compiled(*case, budget=4, threshold=1, official=True)
    assert official.T.astype(int).tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]


@hypothesis.given(seed=st.integers(0, 10**6), order=st.permutations(range(NEURONS)))
def test_permuting_neurons_permutes_the_mask(seed, order):
    case = make_case(np.random.default_rng(seed), "distinct", 31, 0.6, 0.3)
    # Weights off the mask never tie with any that count.
    result, _ = update(case)
    permuted = [x[order] for x in case[:3]]
    np.testing.assert_array_equal(update(Case(*permuted, *case[3:]))[0], result[order])


def test_nothing_changes_when_nothing_is_dropped_or_ablated():
    case = make_case(np.random.default_rng(3), "distinct", 40, 0, 0)
    mask = np.zeros_like(case.mask)
    for row in mask:
        row[np.random.default_rng(4).permutation(INPUTS)[: 40 // NEURONS]] = True
    weight = np.float32(np.where(mask, 1 + np.arange(mask.size).reshape(mask.shape), 0))
    result, _ = update(case._replace(mask=mask, weight=weight))
    np.testing.assert_array_equal(result, mask)


def test_one_compilation_serves_every_number():
    traces = []

    @jax.jit
    def change(mask, weight, gradient, n_drop, budget, threshold):
        traces.append(None)
        options = dict(budget=budget, threshold=threshold)
        return fan_in.update(mask, weight, gradient, n_drop, **options)

    case = make_case(np.random.default_rng(5), "distinct", 40, 0.6, 0.3)
    arrays = [x.T for x in case[:3]]
    numbers = [(0, 40, 0), (9, 40, 3), (12, 30, 1)]
    results = [change(*arrays, *given) for given in numbers]
    assert len(traces) == 1
    assert len({int(result.sum()) for result in results}) > 1
    eager = fan_in.update(
        *map(jnp.asarray, arrays), numbers[1][0], budget=40, threshold=3
    )
    np.testing.assert_array_equal(results[1], eager)


def test_gradients_may_be_wider_than_weights():
    case = make_case(np.random.default_rng(6), "distinct", 40, 0.6, 0.3)
    weight = jnp.asarray(case.weight.T, jnp.bfloat16)
    arguments = case.mask.T, weight, case.gradient.T, case.n_drop
    with jax.numpy_dtype_promotion("standard"):
        result = compiled(*arguments, budget=40, threshold=case.threshold)
    seen = case._replace(weight=np.asarray(weight.T, np.float32))
    expected = srigl_oracle.update(*seen, index=index_of("dense"))
    np.testing.assert_array_equal(result.T, expected)


# First masks


@pytest.mark.parametrize("form", FORMS)
def test_every_neuron_draws_its_own(form):
    shape, layout = FORMS[form]
    weight = jnp.zeros(shape, jnp.bfloat16)
    draw = lambda key, name: fan_in.random_masks(key, [name], [weight], [5], [layout])
    (mask,) = draw(jax.random.key(0), "a")
    mask = as_matrix(mask, form)
    assert (mask.sum(axis=1) == 5).all()
    assert len({row.tobytes() for row in mask}) == NEURONS
    other_name, other_key = (
        as_matrix(*draw(jax.random.key(key), name), form)
        for key, name in ((0, "b"), (1, "a"))
    )
    assert (mask != other_name).any() and (mask != other_key).any()


def test_stacked_layers_have_a_fan_in_of_their_own():
    weight, layout = jnp.zeros((3, 12, 7)), Layout(batch=(0,))
    k = jnp.array([2, 5, 12])
    (mask,) = fan_in.random_masks(jax.random.key(0), ["a"], [weight], [k], [layout])
    np.testing.assert_array_equal(mask.sum(axis=1), np.repeat(k[:, None], 7, axis=1))


def test_all_inputs_are_as_likely():
    weight = jnp.zeros((12, 4))
    draw = lambda key: fan_in.random_masks(key, ["a"], [weight], [3], [Layout()])[0]
    draws = 4000
    keys = jax.random.split(jax.random.key(0), draws)
    often = jax.jit(jax.vmap(draw))(keys).mean(axis=0)
    deviation = math.sqrt(1 / 4 * 3 / 4 / draws)
    assert np.abs(often - 1 / 4).max() < 4.5 * deviation
    assert np.std(often) > deviation / 3


# Fixtures: fan-ins and thresholds of known networks


@pytest.mark.parametrize(
    ("sparsity", "of_768", "of_3072", "thresholds"),
    [
        (0.80, 153, 614, (145, 583)),
        (0.90, 76, 307, (72, 291)),
        (0.95, 38, 153, (36, 145)),
        (0.99, 7, 30, (6, 28)),
    ],
)
def test_vision_transformers(sparsity, of_768, of_3072, thresholds):
    shapes = {"qkv": (2304, 768), "head": (1000, 768), "mlp.3": (768, 3072)}
    kept = distributions.uniform(shapes, sparsity)
    fan_ins = {path: kept[path] // shape[0] for path, shape in shapes.items()}
    assert fan_ins == {"qkv": of_768, "head": of_768, "mlp.3": of_3072}
    own = fan_in.ablation_threshold
    assert (own(0.95, of_768), own(0.95, of_3072)) == thresholds


def test_thresholds_of_resnet50():
    shapes = network_shapes.resnet50()
    kept = distributions.erk(shapes, 0.99)
    fan_ins = [n // shapes[path][-1] for path, n in kept.items()]
    found = [fan_in.ablation_threshold(0.3, k) for k in fan_ins]
    assert found[:12] == [1, 2, 3, 1, 1, 7, 3, 1, 7, 3, 1, 4]
    assert len(found) == 54 and min(found) == 1


@pytest.mark.parametrize(
    ("gamma", "k", "expected"),
    [(0, 9, 0), (0.1, 9, 1), (0.1, 30, 3), (0.7, 10, 7), (0.29, 100, 29), (1, 9, 1)],
)
def test_thresholds_are_exact(gamma, k, expected):
    assert fan_in.ablation_threshold(gamma, k) == expected
    assert srigl_oracle.threshold(gamma, k) == expected


@pytest.mark.parametrize("gamma", [-0.1, math.nan, math.inf, None, "0.3"])
def test_no_other_gamma(gamma):
    with pytest.raises(ValueError, match="at least 0, got"):
        fan_in.ablation_threshold(gamma, 9)


@functools.cache
def trained_for_a_while():
    """Update a layer many times, with weights and gradients that drift."""
    rng = np.random.default_rng(7)
    case = make_case(rng, "distinct", 30, 0.9, 0.3)
    history = []
    for _ in range(12):
        result, _ = update(case)
        history.append(result)
        scale = rng.gamma(0.5, size=(2, NEURONS, 1))
        weight, gradient = scale * rng.normal(size=(2, *result.shape))
        case = case._replace(
            mask=result,
            weight=np.float32(weight * result),
            gradient=np.float32(gradient),
            n_drop=int(result.sum() * 0.3),
        )
    return history


def test_neurons_die_and_come_back_over_time():
    live = np.array([mask.any(axis=1) for mask in trained_for_a_while()])
    before, after = live[:-1], live[1:]
    assert (before & ~after).any() and (~before & after).any()
