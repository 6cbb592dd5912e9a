import time

import numpy as np
import pytest

from experiments import timing


def test_calls_take_turns_until_the_time_is_over():
    made = []
    calls = {
        name: lambda name=name, s=s: (made.append(name), time.sleep(s))[0]
        for name, s in {"short": 0.001, "long": 0.003}.items()
    }
    times = timing.in_turn(calls, seconds=0.05)
    rounds = len(times["short"])
    assert 9 <= rounds <= 13
    assert made == ["short", "long"] * (rounds + 2)
    assert (times["short"] >= 0.001).all() and (times["long"] >= 0.003).all()


@pytest.mark.parametrize(
    ("seconds", "limits", "rounds"),
    [(0, {"min_rounds": 3}, 3), (60, {"max_rounds": 5}, 5)],
)
def test_rounds_are_limited(seconds, limits, rounds):
    times = timing.in_turn({"none": lambda: None}, seconds=seconds, **limits)
    assert len(times["none"]) == rounds


def test_median_and_interval():
    # Of nine fair coins at most one falls on one side with probability 10 / 512.
    assert timing.median_and_interval(range(9)) == (4, 1, 7)
    assert timing.median_and_interval([3.0, 1.0, 2.0]) == (2, 1, 3)
    assert timing.median_and_interval([5.0]) == (5, 5, 5)


def test_the_interval_covers_the_median_as_often_as_it_says():
    draws = np.random.default_rng(0).exponential(size=(2000, 15))
    intervals = map(timing.median_and_interval, draws)
    covered = np.mean([low <= np.log(2) <= high for _, low, high in intervals])
    assert 0.95 <= covered <= 0.98
