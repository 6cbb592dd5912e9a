import fractions
import math

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
