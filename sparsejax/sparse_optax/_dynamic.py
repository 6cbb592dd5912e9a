"""What algorithms share that drop a fraction of the weights now and then, and grow."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from sparsejax import schedules
from sparsejax._request import check_key
from sparsejax.distributions import Distribution
from sparsejax.masks.layout import Layout, Leaf, Where
from sparsejax.masks.patterned import (
    Patterned,
    Patterns,
    drop_and_grow_all,
    patterned_leaves,
)
from sparsejax.schedules import Periodic, Schedule, share
from sparsejax.sparse_optax._core import Algorithm, Change, Start, transformation
from sparsejax.sparse_optax._first import first_masks

Update = Callable[[Sequence[Leaf], list[jax.Array], Change, Any], list[jax.Array]]
Grow = Callable[[Sequence[Patterned], Change], dict[str, Any]]


class Dynamic(NamedTuple):
    """The arguments of a drop-and-grow algorithm, as its factory documents them."""

    sparsity: float | None
    distribution: str | Distribution
    where: Where
    layout: Mapping[str, Layout] | None
    key: jax.Array | None
    drop_fraction: float | Schedule
    start_at: int
    update_every: int
    stop_at: int | None
    step_on_update: bool
    accumulate: int = 1
    pattern: Patterns = None
    masks: Any = None

    def start(self, name: str) -> Start:
        """Return the start of the algorithm ``name``, its arguments checked."""
        return first_masks(
            name,
            sparsity=self.sparsity,
            masks=self.masks,
            distribution=self.distribution,
            where=self.where,
            layout=self.layout,
            pattern=self.pattern,
        )


def dynamic_transformation(
    name: str,
    inner: optax.GradientTransformation | None,
    arguments: Dynamic,
    start: Start,
    update: Update,
    *,
    needs_gradient: bool,
) -> optax.GradientTransformationExtraArgs:
    """Build an algorithm that changes masks by a fraction of them, periodically.

    ``start`` draws masks as an `Algorithm` does. ``update`` changes them, ``(leaves,
    masks, Change, fraction) -> masks``.
    """
    a = arguments
    check_key(name, a.key)
    period = Periodic(a.start_at, a.update_every, a.stop_at).check(name)
    drop_fraction = _drop_schedule(name, a.drop_fraction, a.stop_at)
    _check_accumulate(name, a.accumulate, period)

    def due(step):
        return period.due(step) & (step > 0)

    def change(leaves, masks, now):
        return update(leaves, masks, now, drop_fraction(now.step))

    def accumulate(step):
        to_go = -step % period.update_every
        return to_go < a.accumulate, to_go == 0

    algorithm = Algorithm(
        name=name,
        start=start,
        layout=a.layout,
        due=due,
        change=change,
        needs_gradient=needs_gradient,
        accumulate=accumulate if a.accumulate > 1 else None,
        step_on_update=a.step_on_update,
    )
    return transformation(algorithm, inner, a.key)


def drop_and_grow_transformation(
    name: str,
    inner: optax.GradientTransformation | None,
    arguments: Dynamic,
    grow: Grow,
    *,
    needs_gradient: bool,
) -> optax.GradientTransformationExtraArgs:
    """Build SET or RigL; ``grow`` gives the growth of `drop_and_grow_all`."""
    start = arguments.start(name)

    def update(leaves, masks, now, fraction):
        leaves = patterned_leaves(leaves, arguments.pattern)
        return drop_and_grow_all(
            leaves,
            masks,
            now.weights,
            budgets=jax.tree.leaves(now.budgets),
            n_drop=lambda active: share(active, fraction),
            **grow(leaves, now),
        )

    return dynamic_transformation(
        name,
        inner,
        arguments,
        start,
        update,
        needs_gradient=needs_gradient,
    )


def _drop_schedule(name, drop_fraction, stop_at) -> Schedule:
    if callable(drop_fraction):
        return drop_fraction
    try:
        valid = 0 <= drop_fraction <= 1
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(
            f"{name}(drop_fraction=...) must lie in [0, 1] or be a function of the "
            f"step, got {drop_fraction!r}."
        )
    if stop_at:
        return schedules.cosine_drop(drop_fraction, stop_at)
    return schedules.constant_drop(drop_fraction)


def _check_accumulate(name, accumulate, period) -> None:
    whole = isinstance(accumulate, int) and not isinstance(accumulate, bool)
    if not whole or not 1 <= accumulate <= period.update_every:
        raise ValueError(
            f"{name}(accumulate=...) counts the steps before an update whose gradients "
            f"are summed and must lie in [1, update_every={period.update_every}], got "
            f"{accumulate!r}."
        )
