import fractions
import math

import chase_oracles
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from sparsejax import schedules

# What the papers' runs use: updates every so many steps, up to T_end.
RUNS = [(100, 73_125, 731), (800, 192_000, 239), (100, 35_188, 351)]

alphas = st.integers(0, 100).map(lambda n: n / 100)
horizons = st.integers(1, 1_000_000)
periods = st.tuples(
    st.integers(0, 40), st.integers(1, 15), st.none() | st.integers(0, 60)
).map(lambda p: (p[0], p[1], None if p[2] is None else p[0] + p[2]))


def evaluate(schedule, steps):
    """Evaluate a schedule at many steps; strict about what comes out of it."""
    values = np.asarray(schedule(jnp.asarray(steps, jnp.int32)))
    assert values.dtype == np.float32
    return values


def sample(horizon):
    """Sixteen steps, the ends and what lies beyond them included."""
    inside = [horizon * i // 12 for i in range(13)]
    return [*inside, horizon - 1, horizon + 1, 3 * horizon]


@pytest.mark.parametrize(("update_every", "stop_at", "updates"), RUNS)
def test_cosine_drop_falls_from_alpha_to_zero(update_every, stop_at, updates):
    steps = np.arange(0, stop_at + 1, update_every)
    drop = schedules.cosine_drop(0.3, stop_at)
    values = evaluate(drop, steps)
    assert values[0] == np.float32(0.3)
    assert float(drop(stop_at)) == 0.0
    assert np.all(np.diff(values) <= 0)
    assert np.all(np.diff(values[::10]) < 0)
    expected = [oracles.cosine_drop(0.3, stop_at, int(t)) for t in steps]
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-7)


@hypothesis.given(alphas, horizons)
def test_cosine_drop_equals_the_oracle(alpha, stop_at):
    values = evaluate(schedules.cosine_drop(alpha, stop_at), sample(stop_at))
    expected = [oracles.cosine_drop(alpha, stop_at, t) for t in sample(stop_at)]
    np.testing.assert_allclose(values, expected, rtol=0, atol=2e-7)
    assert values[0] == np.float32(alpha)
    assert not values[[12, 14, 15]].any()


@hypothesis.given(alphas, horizons)
def test_linear_drop_equals_the_oracle(alpha, stop_at):
    values = evaluate(schedules.linear_drop(alpha, stop_at), sample(stop_at))
    expected = [float(oracles.linear_drop(alpha, stop_at, t)) for t in sample(stop_at)]
    np.testing.assert_allclose(values, expected, rtol=0, atol=2e-7)
    assert values[0] == np.float32(alpha)
    assert not values[[12, 14, 15]].any()


@hypothesis.given(alphas, st.integers(0, 2**31 - 1))
def test_constant_drop_never_changes(alpha, step):
    assert schedules.constant_drop(alpha)(step) == float(
        oracles.constant_drop(alpha, step)
    )


@pytest.mark.parametrize(
    "make",
    [
        schedules.constant_drop,
        lambda alpha: schedules.linear_drop(alpha, 10),
        lambda alpha: schedules.cosine_drop(alpha, 10),
    ],
)
@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_a_drop_fraction_outside_the_unit_interval_is_refused(make, alpha):
    with pytest.raises(ValueError, match=rf"_drop\(initial=.*\[0, 1\].*got {alpha}"):
        make(alpha)


@pytest.mark.parametrize("make", [schedules.linear_drop, schedules.cosine_drop])
@pytest.mark.parametrize("stop_at", [0, -5])
def test_a_drop_fraction_needs_steps_to_fall_in(make, stop_at):
    with pytest.raises(ValueError, match=rf"_drop\(stop_at=.*at least 1.*{stop_at}"):
        make(0.3, stop_at)


@hypothesis.given(st.integers(0, 1000), horizons)
def test_cubic_progress_equals_the_oracle(start_at, length):
    last = start_at + length
    steps = [start_at + t for t in sample(length)]
    values = evaluate(schedules.cubic_progress(start_at, last), steps)
    expected = [float(oracles.cubic_progress(t, start_at, last)) for t in steps]
    np.testing.assert_allclose(values, expected, rtol=0, atol=5e-7)
    assert values[0] == 0.0
    assert np.all(values[[12, 14, 15]] == 1.0)
    assert np.all(np.diff(values[:13]) >= 0)


@hypothesis.given(st.integers(1, 1000), horizons, st.integers(1, 1000))
def test_cubic_progress_is_zero_before_it_starts(start_at, length, early):
    progress = schedules.cubic_progress(start_at, start_at + length)
    assert float(progress(max(start_at - early, 0))) == 0.0


def test_cubic_progress_of_no_length_is_a_jump():
    values = evaluate(schedules.cubic_progress(5, 5), [0, 4, 5, 6])
    assert values.tolist() == [0.0, 0.0, 1.0, 1.0]


def test_cubic_progress_that_ends_before_it_starts_is_refused():
    with pytest.raises(ValueError, match=r"cubic_progress\(stop_at=.*=10, got 9"):
        schedules.cubic_progress(10, 9)


# A compiler may divide by a constant through its rounded inverse.
@pytest.mark.parametrize(
    ("make", "end"),
    [
        (lambda stop_at: schedules.linear_drop(0.3, stop_at), 0.0),
        (lambda stop_at: schedules.cosine_drop(0.3, stop_at), 0.0),
        (lambda stop_at: schedules.cubic_progress(0, stop_at), 1.0),
    ],
    ids=["linear", "cosine", "cubic"],
)
@pytest.mark.parametrize("stop_at", [10, 300, 73_125])
def test_compiled_schedules_end_exactly(make, end, stop_at):
    schedule = jax.jit(make(stop_at))
    assert float(schedule(stop_at)) == end
    assert float(schedule(stop_at + 1)) == end
    assert abs(float(schedule(stop_at // 2)) - end) > 0.1


@pytest.mark.parametrize(("update_every", "stop_at", "updates"), RUNS)
def test_the_runs_of_the_papers_have_their_number_of_updates(
    update_every, stop_at, updates
):
    steps = np.arange(1, stop_at + 5 * update_every)
    due = schedules.Periodic(0, update_every, stop_at).due(jnp.asarray(steps))
    assert int(due.sum()) == updates
    first_and_last = steps[np.asarray(due)][[0, -1]]
    assert first_and_last.tolist() == [update_every, update_every * updates]


@hypothesis.given(periods)
def test_due_steps_equal_the_oracle(period):
    steps = np.arange(1, 128)
    due = schedules.Periodic(*period).due(jnp.asarray(steps))
    assert due.tolist() == [oracles.mask_is_due(int(t), *period) for t in steps]


@hypothesis.given(periods)
@hypothesis.example((10, 5, 10))
@hypothesis.example((7, 5, 10))
@hypothesis.example((7, 5, 11))
def test_the_first_and_the_last_due_step_are_known(period):
    schedule = schedules.Periodic(*period)
    steps = np.arange(0, 128)
    due = steps[np.asarray(schedule.due(jnp.asarray(steps)))]
    if period[2] is None:
        assert (schedule.first, schedule.last) == (due[0], None)
        return
    if due.size:
        assert (schedule.first, schedule.last) == (due[0], due[-1])
        assert due.tolist() == oracles.pruning_events(*period)
    else:
        assert schedule.last is None
        assert oracles.pruning_events(*period) == [period[0]]


@pytest.mark.parametrize(
    ("period", "message"),
    [
        ((-1, 10, None), r"owner\(start_at=.*at least 0, got -1"),
        ((0, 0, None), r"owner\(update_every=.*at least 1, got 0"),
        ((0, 10.0, None), r"owner\(update_every=.*integer.*got 10\.0"),
        ((True, 10, None), r"owner\(start_at=.*integer.*got True"),
        ((None, 10, None), r"owner\(start_at=.*integer.*got None"),
        ((0, 10, -1), r"owner\(stop_at=.*at least 0, got -1"),
        ((50, 10, 40), r"owner\(stop_at=.*start_at=50, got 40"),
    ],
)
def test_a_period_that_makes_no_sense_is_refused(period, message):
    with pytest.raises(ValueError, match=message):
        schedules.Periodic(*period).check("owner")


@hypothesis.given(periods)
def test_a_period_that_makes_sense_is_accepted(period):
    schedule = schedules.Periodic(*period)
    assert schedule.check("owner") is schedule


share = jax.jit(schedules.share)


@hypothesis.given(st.integers(0, 10_000), st.integers(0, 1000))
def test_a_share_in_decimals_is_taken_as_written(count, thousandths):
    expected = math.floor(fractions.Fraction(thousandths, 1000) * count)
    assert int(share(count, thousandths / 1000)) == expected


@hypothesis.given(
    st.integers(0, 2**31 - 1),
    st.floats(0, 1, width=32, allow_subnormal=False)
    | st.integers(0, 2**24).map(lambda n: n / 2**24),
)
@hypothesis.example(2**31 - 1, 1.0)
@hypothesis.example(2**31 - 1, 0.0)
@hypothesis.example(2**31 - 1, float(np.nextafter(np.float32(1), np.float32(0))))
def test_a_share_is_the_floor_but_for_the_last_bits_of_the_fraction(count, fraction):
    taken = int(share(count, fraction))
    product = fractions.Fraction(fraction) * count
    # The fraction is rounded to 26 bits, then given the benefit of two units.
    rounding = fractions.Fraction(count, 2**27)
    benefit = min(4 * rounding, fractions.Fraction(1, 2))
    lowest = product if rounding <= benefit else product - rounding
    assert math.floor(lowest) <= taken <= math.floor(product + rounding + benefit)
    if fraction in (0.0, 1.0):
        assert taken == fraction * count


@pytest.mark.parametrize(("fraction", "taken"), [(-0.5, 0), (1.5, 2**31 - 1)])
def test_a_share_of_less_than_nothing_or_more_than_all_is_clipped(fraction, taken):
    assert int(share(2**31 - 1, fraction)) == taken


@hypothesis.given(alphas, horizons, st.integers(1, 10_000))
def test_the_number_to_drop_is_the_oracles(alpha, stop_at, active):
    steps = sample(stop_at)
    drop = schedules.cosine_drop(alpha, stop_at)
    counts = np.asarray(share(jnp.full(16, active), drop(jnp.asarray(steps))))
    for step, count in zip(steps, counts, strict=True):
        exact = active * oracles.cosine_drop(alpha, stop_at, step)
        # float32 does not know on which side of an integer a product this near lies.
        slack = 4e-7 * active
        assert math.floor(exact - slack) <= count <= math.floor(exact + slack)


@hypothesis.given(alphas, alphas, horizons)
def test_cosine_between_equals_the_oracle(initial, final, stop_at):
    values = evaluate(
        schedules.cosine_between(initial, final, stop_at), sample(stop_at)
    )
    expected = [
        chase_oracles.half_cosine(initial, final, stop_at, t) for t in sample(stop_at)
    ]
    np.testing.assert_allclose(values, expected, rtol=0, atol=3e-7)
    assert values[0] == np.float32(initial)
    assert (values[[12, 14, 15]] == np.float32(final)).all()


@pytest.mark.parametrize(
    ("step", "density"),
    [(0, 0.15), (1000, 0.14997), (20_000, 0.1392), (32_000, 0.1256), (64_000, 0.10003)],
)
def test_the_soft_bound_of_chase_on_cifar(step, density):
    surplus = schedules.cosine_between(0.05, 0.0, stop_at=65_000)
    np.testing.assert_allclose(0.1 + surplus(step), density, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("step", "stop_at", "rate"),
    [(65_000, 80_000, 0.0467), (80_000, 80_000, 0.005), (201_000, 250_200, 0.0508)],
)
def test_the_replacement_rate_of_chase(step, stop_at, rate):
    replaced = schedules.cosine_between(0.5, 0.005, stop_at)
    np.testing.assert_allclose(replaced(step), rate, rtol=0, atol=6e-5)


# Channels, the fraction that goes, the end of removal, its period, and published
# numbers of channels at some of its steps.
VGG19_KEEPS = (4223, 3598, 3145, 2837, 2646, 2544, 2503, 2496)
CHASE_RUNS = {
    "vgg19": (
        (4992, 0.5, 65_000),
        8000,
        dict(zip(range(7500, 65_000, 8000), VGG19_KEEPS, strict=True)),
    ),
    "resnet50_cifar": (
        (7552, 0.5, 65_000),
        1000,
        {500: 7465, 1500: 7296, 20_500: 4987, 64_500: 3776},
    ),
    "resnet50": ((7552, 0.4, 200_160), 5004, {4504: 7352, 199_660: 4531}),
}
CHASE_EVENTS = {
    "vgg19": range(7500, 65_000, 8000),
    "resnet50_cifar": range(500, 65_000, 1000),
    "resnet50": range(4504, 200_160, 5004),
}


@pytest.mark.parametrize("run", CHASE_RUNS)
def test_channels_go_half_an_exploration_ahead(run):
    (_, _, stop_at), remove_every, _ = CHASE_RUNS[run]
    removals = schedules.Periodic(0, remove_every, stop_at, ahead=500)
    events = np.flatnonzero(removals.due(np.arange(stop_at + remove_every)))
    assert events.tolist() == list(CHASE_EVENTS[run])
    assert (removals.first, removals.last) == (events[0], events[-1])
    assert len(events) == {"vgg19": 8, "resnet50_cifar": 65, "resnet50": 40}[run]


@pytest.mark.parametrize("run", CHASE_RUNS)
def test_channels_kept_by_the_published_runs(run):
    arguments, _, published = CHASE_RUNS[run]
    kept = schedules.channels_kept(*arguments)
    assert {step: int(kept(step)) for step in published} == published
    channels, sparsity, stop_at = arguments
    assert int(kept(0)) == channels
    assert int(kept(stop_at)) == math.floor(channels * (1 - oracles.exact(sparsity)))


@pytest.mark.parametrize("run", CHASE_RUNS)
def test_channels_kept_equal_exact_arithmetic_at_every_event(run):
    (channels, sparsity, stop_at), _, _ = CHASE_RUNS[run]
    steps = np.arange(0, stop_at + 1, 500)
    kept = schedules.channels_kept(channels, sparsity, stop_at)(jnp.asarray(steps))
    assert kept.dtype == jnp.int32
    expected = [
        chase_oracles.channels_kept(channels, sparsity, stop_at, int(t)) for t in steps
    ]
    np.testing.assert_array_equal(kept, expected)


def test_no_channel_goes_at_a_channel_sparsity_of_zero():
    kept = schedules.channels_kept(4992, jnp.float32(0), 100)
    assert {int(kept(t)) for t in range(102)} == {4992}


@pytest.mark.parametrize(
    ("arguments", "name"), [((1.5, 0.0, 10), "initial"), ((0.5, -0.1, 10), "final")]
)
def test_cosine_between_refuses_what_is_no_fraction(arguments, name):
    with pytest.raises(ValueError, match=rf"cosine_between\({name}=.*\[0, 1\]"):
        schedules.cosine_between(*arguments)


@pytest.mark.parametrize("stop_at", [1, 3, 90, 75_000])
def test_linear_fade_falls_from_exactly_1_to_exactly_0(stop_at):
    steps = sample(stop_at)
    values = evaluate(schedules.linear_fade(stop_at), steps)
    expected = [float(oracles.linear_drop(1.0, stop_at, t)) for t in steps]
    np.testing.assert_allclose(values, expected, rtol=0, atol=2e-7)
    fade = jax.jit(schedules.linear_fade(stop_at))
    assert (fade(0), fade(stop_at), fade(2 * stop_at)) == (1.0, 0.0, 0.0)
    assert (np.diff(np.asarray(values)[np.argsort(steps)]) <= 0).all()


def test_linear_fade_refuses_an_end_at_once():
    with pytest.raises(ValueError, match=r"linear_fade\(stop_at=.*at least 1, got 0"):
        schedules.linear_fade(0)
