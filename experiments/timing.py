"""Time functions in turn: a ratio compares what a machine did in the same second."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy import stats


def in_turn(
    calls: Mapping[str, Callable[[], Any]],
    *,
    seconds: float,
    min_rounds: int = 9,
    max_rounds: int = 1000,
) -> dict[str, np.ndarray]:
    """Call functions one after another, round after round, and time each call.

    Two rounds before those that count compile and warm up.

    Args:
      calls: functions without arguments, of arrays or trees of arrays, by name.
      seconds: after which no round begins.
      min_rounds: that are run however long they take.
      max_rounds: that are run however short they are.

    Returns:
      Seconds of every call by name, [rounds].
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(2):
        jax.block_until_ready([call() for call in calls.values()])
    end = time.perf_counter() + seconds
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() > end:
            break
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - begin)
    return {name: np.array(values) for name, values in times.items()}


def median_and_interval(
    values: Sequence[float] | np.ndarray, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Return the median of independent values and the ends of its interval.

    The ends are two of the values, whatever distribution they come from: each value
    falls on either side of the true median as a fair coin does. Fewer than six values
    have no interval of 95 %; theirs goes from the smallest to the largest.

    Args:
      values: at least one.
      confidence: that the interval covers the true median.
    """
    ordered = np.sort(np.asarray(values, float))
    first = max(int(stats.binom.ppf((1 - confidence) / 2, len(ordered), 0.5)) - 1, 0)
    return float(np.median(ordered)), float(ordered[first]), float(ordered[-1 - first])
