"""Schedules: when masks change, and by how much.

A step is the number of completed update calls, so the first call sees step 0. Values
are functions of the step, traced or not, in the form that optax's schedules have; any
of those, and any function of one's own, may stand in their place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[chex.Numeric], Any]


def constant_drop(initial: float) -> Schedule:
    """Return a drop fraction that never changes.

    Args:
      initial: the fraction of active weights that an update drops, in [0, 1].

    Raises:
      ValueError: ``initial`` is outside [0, 1].
    """
    return optax.constant_schedule(_fraction("constant_drop", initial))


def linear_drop(initial: float, stop_at: int) -> Schedule:
    """Return a drop fraction that falls linearly to 0 at ``stop_at``.

    Args:
      initial: the fraction of active weights that an update at step 0 would drop.
      stop_at: the step from which on it is 0.

    Raises:
      ValueError: ``initial`` is outside [0, 1] or ``stop_at`` is not positive.
    """
    initial = _fraction("linear_drop", initial)
    stop_at = _positive("linear_drop", stop_at)
    return lambda step: initial * _left(step, 0, stop_at)


def linear_fade(stop_at: int) -> Schedule:
    """Return what falls linearly from 1 at step 0 to exactly 0 from ``stop_at`` on.

    It is how the ghosts of `sparsejax.recipes` fade.

    Args:
      stop_at: the step from which on it is 0.

    Raises:
      ValueError: ``stop_at`` is not positive.

    Example:
      >>> from sparsejax import schedules
      >>> intensity = schedules.linear_fade(90)
      >>> [float(intensity(t)) for t in (0, 45, 90, 180)]
      [1.0, 0.5, 0.0, 0.0]
    """
    stop_at = _positive("linear_fade", stop_at)
    return lambda step: _left(step, 0, stop_at)


def cosine_drop(initial: float, stop_at: int) -> Schedule:
    """Return RigL's drop fraction, half a cosine from ``initial`` to 0.

    ``f(t) = initial / 2 * (1 + cos(pi * t / stop_at))``: Evci et al. 2020, "Rigging
    the lottery", section 3 (2), after Dettmers and Zettlemoyer 2019.

    Args:
      initial: the fraction of active weights that an update at step 0 would drop.
      stop_at: the step from which on it is 0.

    Raises:
      ValueError: ``initial`` is outside [0, 1] or ``stop_at`` is not positive.

    Example:
      >>> from sparsejax import schedules
      >>> drop_fraction = schedules.cosine_drop(0.3, stop_at=1000)
      >>> [round(float(drop_fraction(t)), 3) for t in (0, 500, 1000)]
      [0.3, 0.15, 0.0]
    """
    initial = _fraction("cosine_drop", initial)
    return optax.cosine_decay_schedule(initial, _positive("cosine_drop", stop_at))


def cubic_progress(start_at: int, stop_at: int) -> Schedule:
    """Return the fraction of the pruning that is done, 0 to 1, fast at first.

    ``p(t) = 1 - (1 - (t - start_at) / (stop_at - start_at))**3``; multiplied with the
    final sparsity it is the schedule of Zhu and Gupta 2017, "To prune, or not to
    prune", equation 1.

    Args:
      start_at: the step up to which it is 0.
      stop_at: the step from which on it is 1; equal to ``start_at``, a jump.

    Raises:
      ValueError: ``stop_at`` lies before ``start_at``.

    Example:
      >>> from sparsejax import schedules
      >>> progress = schedules.cubic_progress(100, 200)
      >>> [float(progress(t)) for t in (0, 100, 150, 200)]
      [0.0, 0.0, 0.875, 1.0]
    """
    if stop_at < start_at:
        raise ValueError(
            f"cubic_progress(stop_at=...) must not lie before start_at={start_at}, "
            f"got {stop_at}."
        )
    if stop_at == start_at:
        return lambda step: jnp.where(jnp.asarray(step) < start_at, 0.0, 1.0)
    return lambda step: 1.0 - _left(step, start_at, stop_at) ** 3


def cosine_between(initial: float, final: float, stop_at: int) -> Schedule:
    """Return half a cosine from ``initial`` at step 0 to ``final`` at ``stop_at``.

    ``f(t) = final + (initial - final) / 2 * (1 + cos(pi * t / stop_at))``. Chase (Yin
    et al. 2023) has two: the share of all weights that training holds beyond its
    budget, from 0.05 to 0 or 0.005, and the fraction of active weights that it
    replaces later, from 0.5 to 0.005.

    Args:
      initial: the fraction at step 0, in [0, 1].
      final: the fraction from ``stop_at`` on, in [0, 1].
      stop_at: the step from which on it is ``final``.

    Raises:
      ValueError: a fraction is outside [0, 1] or ``stop_at`` is not positive.

    Example:
      >>> from sparsejax import schedules
      >>> replaced = schedules.cosine_between(0.5, 0.005, stop_at=80_000)
      >>> [round(float(replaced(t)), 4) for t in (0, 65_000, 80_000)]
      [0.5, 0.0467, 0.005]
    """
    initial = _fraction("cosine_between", initial)
    final = _fraction("cosine_between", final, "final")
    fall = optax.cosine_decay_schedule(1.0, _positive("cosine_between", stop_at))

    def schedule(step):
        left = fall(step)
        return initial * left + final * (1.0 - left)  # exact at both ends

    return schedule


def channels_kept(
    channels: int, channel_sparsity: chex.Numeric, stop_at: int
) -> Schedule:
    """Return how many channels gradual removal leaves at a step.

    ``K(t) = floor(channels * (1 - channel_sparsity * p(t)))`` with the progress p of
    `cubic_progress` from step 0 to ``stop_at``: Yin et al. 2023, "Dynamic sparsity is
    channel-level sparsity learner".

    Args:
      channels: how many there are at first, in all groups together.
      channel_sparsity: the fraction of them that is gone in the end, in [0, 1), traced
        or not.
      stop_at: the step from which on the last of them is gone.

    Returns:
      A function from the step to an int32 scalar.

    Example:
      >>> from sparsejax import schedules
      >>> kept = schedules.channels_kept(4992, 0.5, stop_at=65_000)
      >>> [int(kept(t)) for t in (0, 7_500, 63_500)]
      [4992, 4223, 2496]
    """
    progress = cubic_progress(0, stop_at)
    return lambda step: share(channels, 1.0 - channel_sparsity * progress(step))


class Periodic(NamedTuple):
    """Steps at multiples of ``update_every``, or before, in ``[start_at, stop_at)``.

    Attributes:
      start_at: no update before this step.
      update_every: steps between updates.
      stop_at: no update from this step on; ``None``: they never end.
      ahead: how many steps before the multiples.
    """

    start_at: int
    update_every: int
    stop_at: int | None
    ahead: int = 0

    def check(self, owner: str) -> "Periodic":
        """Return the schedule; raise ValueError, naming ``owner``, if it is none."""
        for name, least in (("start_at", 0), ("update_every", 1), ("stop_at", 0)):
            value = getattr(self, name)
            if value is None and name == "stop_at":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{owner}({name}=...) counts steps and must be an integer of at "
                    f"least {least}, got {value!r}."
                )
        if self.stop_at is not None and self.stop_at < self.start_at:
            raise ValueError(
                f"{owner}(stop_at=...) must not lie before start_at={self.start_at}, "
                f"got {self.stop_at}."
            )
        return self

    def due(self, step: chex.Numeric) -> jax.Array:
        """Tell whether ``step`` is one of the steps."""
        step = jnp.asarray(step)
        due = (step >= self.start_at) & ((step + self.ahead) % self.update_every == 0)
        return due if self.stop_at is None else due & (step < self.stop_at)

    @property
    def first(self) -> int:
        """The first step, as if they never ended."""
        periods = -(-(self.start_at + self.ahead) // self.update_every)
        return periods * self.update_every - self.ahead

    @property
    def last(self) -> int | None:
        """The last step; ``None`` where there is none or no end."""
        if self.stop_at is None or self.stop_at <= self.first:
            return None
        periods = (self.stop_at - 1 + self.ahead) // self.update_every
        return periods * self.update_every - self.ahead


def share(count: chex.Numeric, fraction: chex.Numeric) -> jax.Array:
    """Return ``floor(count * fraction)`` in integers.

    float32 cannot count beyond 2**24, so the fraction is taken in units of 2**-26 and
    multiplied in integers. It is known to two units only: a product that falls
    short of a whole number by no more than that, and by no more than a half, is taken
    for whole, so that 0.7 of 1000 is 700.

    Args:
      count: non-negative integer, scalar or array.
      fraction: number; clipped to [0, 1].

    Returns:
      int32 array; 0 for a fraction of 0 and ``count`` for 1.

    Example:
      >>> from sparsejax import schedules
      >>> int(schedules.share(1000, 0.7)), int(schedules.share(2**30, 0.25))
      (700, 268435456)
    """
    count = jnp.asarray(count).astype(jnp.uint32)
    fraction = jnp.clip(jnp.asarray(fraction, jnp.float32), 0.0, 1.0)
    units = jnp.round(fraction * 2**26).astype(jnp.uint32)
    # Both factors are split into 13 low bits and the rest: nothing exceeds 32 bits.
    high, low = count >> 13, count & 0x1FFF
    whole, part = units >> 13, units & 0x1FFF
    slack = 2 * jnp.minimum(count, 2**24)
    middle = high * part + low * whole + ((low * part + slack) >> 13)
    return (high * whole + (middle >> 13)).astype(jnp.int32)


def _left(step: chex.Numeric, start_at: int, stop_at: int) -> jax.Array:
    """Return how much of a period is left: 1 before it, exactly 0 after it."""
    step = jnp.asarray(step)
    length = stop_at - start_at
    gone = jnp.clip(step - start_at, 0, length) / length
    # A division may be compiled to a product that misses 1.
    return jnp.where(step >= stop_at, 0.0, 1.0 - gone)


def _fraction(owner: str, value: float, name: str = "initial") -> float:
    if not 0 <= value <= 1:
        raise ValueError(
            f"{owner}({name}=...) is a fraction and must lie in [0, 1], got {value!r}."
        )
    return value


def _positive(owner: str, stop_at: int) -> int:
    if stop_at < 1:
        raise ValueError(
            f"{owner}(stop_at=...) counts steps and must be at least 1, got {stop_at}."
        )
    return stop_at
