"""Chase: dynamic sparse training that moves its weights out of channels it removes."""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from sparsejax._request import Request, check_key, check_sparsity
from sparsejax.distributions import Distribution
from sparsejax.masks import channels
from sparsejax.masks.blend import masked
from sparsejax.masks.coupled import COUPLED, coupled_masks
from sparsejax.masks.layout import Layout, Where, named_leaves
from sparsejax.schedules import (
    Periodic,
    Schedule,
    channels_kept,
    constant_drop,
    cosine_between,
    share,
)
from sparsejax.sparse_optax._conditional import change_if
from sparsejax.sparse_optax._core import Algorithm, transformation
from sparsejax.sparse_optax._groups import (
    channel_floors,
    prunable_groups,
    with_coupled,
)


class ChaseBudgets(NamedTuple):
    """What Chase keeps beside masks: the ``budgets`` of its `SparseState`."""

    weights: Any  # int32: at the start, per leaf or layer of it; None: it is coupled
    live: tuple[chex.Array, ...]  # bool [channels] of each group
    floors: tuple[chex.Array, ...]  # int32: channels that stay of each at least
    channel_sparsity: chex.Array  # shape=(), dtype=jnp.float32


def chase(
    inner: optax.GradientTransformation | None = None,
    *,
    sparsity: float,
    channel_sparsity: float,
    groups: Any,
    skip: bool = False,
    min_channels: float = 0.2,
    criterion: channels.Criterion = "umm",
    scope: Literal["global", "layer"] = "global",
    distribution: str | Distribution = "erk",
    where: Where = None,
    layout: Mapping[str, Layout] | None = None,
    key: jax.Array | None = None,
    soft_extra: float | Schedule = 0.05,
    drop_fraction: float | Schedule = 0.5,
    start_at: int = 0,
    update_every: int = 1000,
    stop_soft_at: int | None = None,
    stop_at: int | None = None,
    remove_every: int = 1000,
    stop_removal_at: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Train a sparse network, and remove whole channels of it on the way.

    Three things happen by the step, all weights competing with each other:

    - Before ``stop_soft_at`` the budget is a soft bound. Every ``update_every`` steps
      the smallest weights go until the budget is met, and more than it allows grow
      where the gradient is largest, for one period.
    - After it the budget is kept: a fraction of the weights is replaced.
    - Halfway between two such updates, every ``remove_every`` steps before
      ``stop_removal_at``, the channels of lowest score go, for good, along
      `sparsejax.schedules.channels_kept`; the last removal leaves as many as asked for.
      The weights that they had are free to grow elsewhere: the sparsity stays, as a
      fraction of the weights that the network had at first.

    A removed channel takes with it the weights that produce it and that read it, its
    bias and its norm's scale and bias, in parameters and in optimizer slots; running
    statistics stay. `get_masks` therefore shows bool masks for the norms, biases and
    dense kernels of the groups that can shrink, all True at first. What is left
    computes the same after `sparsejax.compaction.compact`.

    Masks change before the optimizer steps in the same call, as in `rigl`: weights
    that grew in the last call of a run have been trained by it, and the channels that
    a run ends with follow from ``opt_state.budgets.live``. Growth reads the gradient
    of that call. Weights are ranked and not compared with a threshold, so that exact
    zeros and ties cost no count; a gradient of exactly 0 grows nothing, and where too
    few others are left in live channels, fewer weights are active. No layer has a
    floor of its weights: look at the density of each. A channel without active weights
    scores 0 by any criterion and goes first. With ``channel_sparsity=0`` nothing is
    removed.

    Args:
      inner: the optimizer to run under the mask; None makes this the last link of a
        chain, which needs ``grad=``.
      sparsity: fraction of weights that are zero, in [0, 1).
      channel_sparsity: fraction of the channels of all prunable groups together that
        is removed in the end, in [0, 1). It is held in the state: states that differ
        in it stack, and run under one `jax.vmap`.
      groups: what `sparsejax.compaction.channel_groups` returns, or some of its groups;
        prunable are those without a pinned channel that one layer produces and one
        of the same kind reads, from convolution to convolution or from linear to
        linear.
      skip: whether groups of several layers, as those of a residual stream, and from
        convolution to linear are prunable as well.
      min_channels: each group keeps at least this fraction of the channels that it
        would keep if all lost alike, in [0, 1]; 0.5 for ResNet-50 on CIFAR.
      criterion: what channels are ranked by; see `sparsejax.masks.channels.scores`.
      scope: "global" lets the weights of all layers compete. "layer" keeps in each
        layer the budget that ``distribution`` gave it, as the released code for
        ImageNet does but for solving the distribution anew when channels went. Channels
        compete in either.
      distribution: as in `rigl`: where weights are at first.
      where: as in `rigl`.
      layout: as in `rigl`.
      key: PRNG key of the first mask; ``jax.random.key(0)`` by default.
      soft_extra: fraction of all weights that is held beyond the budget. A number
        falls by half a cosine to 0 at ``stop_soft_at``; a function of the step is taken
        as it is (on ImageNet the paper's falls to 0.005:
        ``schedules.cosine_between(0.05, 0.005, stop_soft_at)``).
      drop_fraction: fraction of the active weights that updates from ``stop_soft_at``
        on replace. A number falls by half a cosine over the whole run to a hundredth at
        ``stop_at``, and is that hundredth where ``stop_at`` is None; a function of the
        step is taken as it is.
      start_at: masks do not change before this step, and never at step 0. Schedules
        run from step 0.
      update_every: steps between updates, which are at multiples of it.
      stop_soft_at: no soft bound from this step on; by default ``stop_removal_at``, or
        the last update where that is earlier, so that a run ends within its budget.
      stop_at: no update from this step on.
      remove_every: steps between removals; ``update_every // 2`` steps before its
        multiples.
      stop_removal_at: no removal from this step on; four fifths of ``stop_at`` by
        default.

    Returns:
      An optax transformation with a `SparseState` whose ``budgets`` are `ChaseBudgets`.

    Raises:
      ValueError, TypeError: arguments that cannot be meant, here; a tree that does not
        fit, at ``init``; a missing ``grad=``, at ``update``.

    References:
      Yin et al. 2023, "Dynamic sparsity is channel-level sparsity learner", sections
      3.1 to 3.3.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from sparsejax import compaction, sparse_optax
      >>> params = {"a": jnp.ones((4, 16)), "b": jnp.ones((16, 2))}
      >>> f = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
      >>> groups = compaction.channel_groups(f, jnp.ones((1, 4)), params=params)
      >>> tx = sparse_optax.chase(
      ...     optax.sgd(0.1), sparsity=0.5, channel_sparsity=0.5, groups=groups,
      ...     update_every=2, remove_every=2, stop_at=40)
      >>> opt_state = tx.init(params)
      >>> int(opt_state.budgets.live[0].sum())
      16
    """
    request = Request("chase", sparsity, distribution, where, layout).check()
    check_key("chase", key)
    check_sparsity("chase(channel_sparsity=...)", channel_sparsity)
    _check_choice("criterion", criterion, channels.CRITERIA)
    _check_choice("scope", scope, ("global", "layer"))
    _check_fraction("min_channels", min_channels)
    period = Periodic(start_at, update_every, stop_at).check("chase")
    _check_steps("remove_every", remove_every, least=1)
    stop_removal_at, stop_soft_at = _ends(period, stop_removal_at, stop_soft_at)
    prunable = prunable_groups(groups, skip=skip)
    removals = Periodic(start_at, remove_every, stop_removal_at, update_every // 2)
    _check_removals(prunable, channel_sparsity, removals)
    n_channels = sum(group.size for group in prunable)
    extra = _schedule("soft_extra", soft_extra, 0.0, stop_soft_at)
    dropped = _schedule("drop_fraction", drop_fraction, 0.01, stop_at)

    def start(params, key):
        masks, weights = request.draw(params, key)
        budgets = ChaseBudgets(
            weights=weights,
            live=tuple(jnp.ones(group.size, bool) for group in prunable),
            floors=channel_floors(prunable, channel_sparsity, min_channels),
            channel_sparsity=jnp.float32(channel_sparsity),
        )
        return with_coupled(params, masks, prunable), budgets

    def explores(step):
        return period.due(step) & (step > 0)

    def removes(step):
        return removals.due(step) & bool(prunable)

    def remaining(step, channel_sparsity):
        kept = channels_kept(n_channels, channel_sparsity, stop_removal_at)
        left = kept(jnp.where(step == removals.last, stop_removal_at, step))
        return jnp.where(removes(step), left, n_channels)

    def change(leaves, masks, now):
        by_path = lambda arrays: dict(zip(layouts, arrays, strict=True))
        layouts = {leaf.path: leaf.layout for leaf in leaves}
        masks, weights, gradients = map(by_path, (masks, now.weights, now.gradients))
        live = now.budgets.live
        if prunable:
            score = functools.partial(
                channels.scores, criterion=criterion, layouts=layouts
            )
            live = channels.remove(
                [score(group, weights, masks) for group in prunable],
                live,
                remaining(now.step, now.budgets.channel_sparsity),
                jnp.stack(now.budgets.floors),
            )
        named = dict(zip((group.name for group in prunable), live, strict=True))
        alive = coupled_masks(prunable, named, weights, COUPLED)
        masks = {p: m & alive[p] if p in alive else m for p, m in masks.items()}
        # A gradient of 0 never grows: removed channels are left out.
        gradients = {
            p: masked(alive[p], g) if p in alive else g for p, g in gradients.items()
        }

        counts = named_leaves(now.budgets.weights)  # of all leaves that are not dense
        pick = lambda arrays: [arrays[path] for path in counts]
        layers = [layouts[p].layer_axes(weights[p].ndim) for p in counts]

        def explore(masks, operands):
            *arrays, counts, step = operands
            keep, total = bounds(masks, counts, layers, step)
            axes = None if scope == "global" else layers
            return channels.drop_and_grow_together(
                masks, *arrays, keep=keep, total=total, axes=axes
            )

        operands = pick(weights), pick(gradients), [*counts.values()], now.step
        explored = change_if(explores(now.step), explore, pick(masks), operands)
        masks |= dict(zip(counts, explored, strict=True))
        return [*masks.values()], now.budgets._replace(live=tuple(live))

    def bounds(masks, counts, layers, step):
        """Return how many weights stay, and to how many they grow, all or by layer."""
        pairs = zip(masks, layers, strict=True)
        active = [jnp.sum(mask, axis=over, dtype=jnp.int32) for mask, over in pairs]
        sizes = [mask.size // n.size for mask, n in zip(masks, counts, strict=True)]
        size, budget = sum(mask.size for mask in masks), sum(map(jnp.sum, counts))
        if scope == "global":
            active, sizes, counts = [sum(map(jnp.sum, active))], [size], [budget]
        soft = step < stop_soft_at
        surplus = jnp.where(soft, extra(step), 0.0)
        density = jnp.maximum(budget, 1) / size
        keep, total = [], []
        for now_active, own_size, n in zip(active, sizes, counts, strict=True):
            rest = jnp.minimum(n, share(now_active, 1.0 - dropped(step)))
            keep.append(jnp.where(soft, n, rest))
            total.append(n + share(own_size, surplus * (n / own_size / density)))
        return (keep[0], total[0]) if scope == "global" else (keep, total)

    algorithm = Algorithm(
        name="chase",
        start=start,
        layout=layout,
        due=lambda step: explores(step) | removes(step),
        change=change,
        needs_gradient=True,
        changes_budgets=True,
    )
    return transformation(algorithm, inner, key)


def _ends(
    period: Periodic, stop_removal_at: int | None, stop_soft_at: int | None
) -> tuple[int, int]:
    """Return when removal and the soft bound end."""
    stop_at, last = period.stop_at, period.last or 0
    if stop_removal_at is None:
        if stop_at is None:
            raise ValueError(
                "chase needs stop_removal_at=..., the step from which on no channel is "
                "removed, or stop_at=..., four fifths of which it is then."
            )
        stop_removal_at = stop_at * 4 // 5
    _check_steps("stop_removal_at", stop_removal_at, least=0)
    if stop_at is not None and stop_removal_at > stop_at:
        raise ValueError(
            f"chase(stop_removal_at=...) must not lie after stop_at={stop_at}, got "
            f"{stop_removal_at}."
        )
    if stop_soft_at is None:
        return stop_removal_at, min(stop_removal_at, last or stop_removal_at)
    _check_steps("stop_soft_at", stop_soft_at, least=0)
    if last and stop_soft_at > last:
        raise ValueError(
            f"chase(stop_soft_at=...) must not lie after the last update, at {last}, "
            f"which returns to the budget, got {stop_soft_at}; lower it, or raise "
            "stop_at=."
        )
    return stop_removal_at, stop_soft_at


def _schedule(
    name: str, value: float | Schedule, left: float, stop_at: int | None
) -> Schedule:
    """Return a function as it is, and a number as what falls to a part of it."""
    if callable(value):
        return value
    _check_fraction(name, value)
    if not stop_at:
        return constant_drop(value * left)
    return cosine_between(value, value * left, stop_at)


def _check_removals(
    groups: list[Any], channel_sparsity: float, removals: Periodic
) -> None:
    if channel_sparsity and not groups:
        raise ValueError(
            f"chase(channel_sparsity={channel_sparsity}) needs groups whose channels "
            "can all be removed, got none in groups=; pass skip=True for groups of "
            "several layers, or print(compaction.channel_groups(...)) for what pins "
            "them."
        )
    if channel_sparsity and removals.last is None:
        raise ValueError(
            f"chase(channel_sparsity={channel_sparsity}) needs a removal in "
            f"[start_at={removals.start_at}, stop_removal_at={removals.stop_at}), got "
            f"none before step {removals.first}; lower remove_every=."
        )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"chase({name}=...) must be one of {choices}, got {value!r}.")


def _check_fraction(name: str, value: Any) -> None:
    try:
        valid = 0 <= value <= 1
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"chase({name}=...) must lie in [0, 1], got {value!r}.")


def _check_steps(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"chase({name}=...) counts steps and must be an integer of at least "
            f"{least}, got {value!r}."
        )
