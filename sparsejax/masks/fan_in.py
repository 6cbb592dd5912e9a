"""Masks in which all live neurons of a layer have one fan-in: SRigL.

A neuron is a slice along the fan-in axes of a weight's layout. Whole neurons may be
ablated, and their share of the layer's budget then goes to those that live.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp

from sparsejax.masks._network import Network
from sparsejax.masks._random import random_words
from sparsejax.masks._random_rows import random_row_mask
from sparsejax.masks._search import keys_of, select
from sparsejax.masks.blend import masked
from sparsejax.masks.layout import Layout
from sparsejax.masks.selection import checked_axes


def ablation_threshold(gamma: float, fan_in: int) -> int:
    """Return how many salient weights a neuron needs so as not to be ablated.

    Args:
      gamma: below 1 the fraction of ``fan_in``, of which the result is the whole part,
        or 1; from 1 on the number itself; 0: no neuron is ever ablated.
      fan_in: active weights a neuron while none is ablated.

    Raises:
      ValueError: ``gamma`` is negative or no finite number.

    References:
      Lasby et al. 2024, "Dynamic sparse training with structured sparsity", section 3.

    Example:
      >>> from sparsejax.masks import fan_in
      >>> [fan_in.ablation_threshold(gamma, 30) for gamma in (0, 0.01, 0.3, 12)]
      [0, 1, 9, 12]
    """
    try:
        valid = 0 <= gamma < float("inf")
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(
            "gamma is the fraction of its fan-in that a neuron needs salient, or from "
            f"1 on their number, and must be at least 0, got {gamma!r}."
        )
    exact = Fraction(repr(float(gamma)))
    if exact >= 1 or exact == 0:
        return int(exact)
    return max(1, int(exact * fan_in))


def random_masks(
    key: jax.Array,
    names: Sequence[str],
    weights: Sequence[jax.Array],
    k: Sequence[chex.Numeric],
    layouts: Sequence[Layout],
) -> list[jax.Array]:
    """Draw masks in which every neuron has its own random ``k`` active weights.

    Args:
      key: a PRNG key.
      names: of the arrays, by which each draws from the key.
      weights: arrays whose shapes and shardings the masks take.
      k: for each the fan-in, an integer, traced or not, scalar or per stacked layer.
      layouts: for each, which axes are neurons.

    Returns:
      List of bool arrays.

    Example:
      >>> import jax
      >>> from sparsejax import masks
      >>> weight = jax.numpy.ones((8, 3))
      >>> (mask,) = masks.fan_in.random_masks(
      ...     jax.random.key(0), ["fc"], [weight], [2], [masks.Layout()])
      >>> mask.sum(axis=0).tolist()
      [2, 2, 2]
    """
    net = Network(weights, layouts)
    wanted = net.rows.split(net.to_rows(net.per_layer(k)))
    words = random_words(key, names)
    return [
        random_row_mask(own_words, weight, own_k, axes)
        for own_words, weight, own_k, axes in _zip(
            words, weights, wanted, net.rows.axes
        )
    ]


def update(
    mask: jax.Array,
    weight: jax.Array,
    gradient: jax.Array,
    n_drop: chex.Numeric,
    *,
    budget: chex.Numeric,
    threshold: chex.Numeric,
    layout: Layout | None = None,
    revive: bool = True,
    official: bool = False,
) -> jax.Array:
    """Drop weights, ablate neurons, and grow the live ones to one common fan-in.

    Salient are the weights of a layer that stay when ``n_drop`` of least magnitude are
    dropped, and as many positions, active or not, of largest gradient. Neurons with
    fewer than ``threshold`` salient ones are ablated, or fewer than the best neuron
    has for which the others could not hold the budget. All others get the fan-in
    ``budget // live``: they keep the largest weights of the layer, at most their
    fan-in, and grow where their own gradient is largest. A NaN is never salient and
    never grown, but on an active weight, as its value or its gradient, it counts as 0.

    Args:
      mask: bool array, ``True`` where a weight is active.
      weight: float array like ``mask``; ranked by magnitude. Active weights that are
        0 are dropped in any case.
      gradient: float array like ``mask``; ranked by magnitude.
      n_drop: how many to drop, an integer, traced or not, scalar or per stacked layer.
      budget: weights of the layer, as ``n_drop``; its fan-in is ``budget // neurons``
        while no neuron is ablated.
      threshold: as ``n_drop``; see `ablation_threshold`. 0 ablates nothing.
      layout: which axes are neurons; ``None`` means the last one.
      revive: whether an ablated neuron lives again when it has ``threshold`` positions
        among those of largest gradient, as in the authors' repository
        (condensed-sparsity), or is gone for good, as in the library that succeeded it
        (sparsimony).
      official: do as the authors' repository does, bit for bit, for comparison: where
        ablated neurons held more than was to be dropped, the rest is filled with
        inactive positions of lowest index, whatever their gradient; and a neuron with
        too many weights keeps those of lowest index, whatever their magnitude. Indices
        are those of the weight as [neurons, inputs, *spatial].

    Returns:
      The new mask.

    Raises:
      TypeError, ValueError: as `sparsejax.masks.top_k_mask`.

    References:
      Lasby et al. 2024, "Dynamic sparse training with structured sparsity", section 3,
      with the clamp of the threshold from the released code.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax.masks import fan_in
      >>> weight = jnp.array([[3.0, 0.0], [0.0, 0.1], [0.0, 0.0]])
      >>> gradient = jnp.array([[0.0, 0.0], [4.0, 0.0], [5.0, 2.0]])
      >>> new = fan_in.update(
      ...     weight != 0, weight, gradient, 1, budget=2, threshold=1)
      >>> new.astype(int).tolist()
      [[1, 0], [0, 0], [1, 0]]
    """
    (mask,) = update_all(
        [mask],
        [weight],
        [gradient],
        n_drop=lambda active: jnp.broadcast_to(
            jnp.asarray(n_drop, jnp.int32).reshape(-1), active.shape
        ),
        budgets=[budget],
        thresholds=[threshold],
        layouts=[layout or Layout()],
        revive=revive,
        official=official,
    )
    return mask


def update_all(
    masks: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    gradients: Sequence[jax.Array],
    *,
    n_drop: Callable[[jax.Array], jax.Array],
    budgets: Sequence[chex.Numeric],
    thresholds: Sequence[chex.Numeric],
    layouts: Sequence[Layout],
    revive: bool = True,
    official: bool = False,
) -> list[jax.Array]:
    """Update several masks as `update` does each.

    Args:
      masks: bool arrays.
      weights: float arrays like the masks.
      gradients: float arrays like the masks.
      n_drop: from how many weights of each layer are active to how many are dropped,
        int32 [layers] both, where a leaf counts as many layers as it stacks.
      budgets: for each mask, scalar or per stacked layer.
      thresholds: as ``budgets``.
      layouts: for each mask.
      revive: as for `update`.
      official: as for `update`.

    Returns:
      The new masks.
    """
    shapes, own_layouts = [mask.shape for mask in masks], layouts
    if official:
        masks, weights, gradients = (
            [own.to_matrix(x) for own, x in zip(own_layouts, arrays, strict=True)]
            for arrays in (masks, weights, gradients)
        )
        stacks = [tuple(range(mask.ndim - 2)) for mask in masks]
        layouts = [Layout(outputs=(-2,), inputs=(-1,), batch=s) for s in stacks]
    net = Network(weights, layouts)
    checked_axes(weights, masks, net.layers.axes)

    in_rows, nonzero = net.row_counts(
        masks, [_nonzero(*pair) for pair in _zip(masks, weights)]
    )
    active, nonzero = net.add_rows(in_rows), net.add_rows(nonzero)
    n_keep = active - jnp.clip(n_drop(active), 0, active)
    n_keep = jnp.minimum(n_keep, nonzero)
    candidate = (in_rows > 0) | revive
    largest, steepest = _salient(
        net, masks, weights, gradients, candidate, n_keep, active - n_keep
    )
    salient, kept = net.row_counts([a | b for a, b in _zip(largest, steepest)], largest)

    budget = net.per_layer(budgets)
    threshold = jnp.minimum(net.per_layer(thresholds), net.clamp(salient, budget))
    live = candidate & (salient >= net.to_rows(threshold))
    share = budget // jnp.maximum(net.add_rows(live), 1)
    fan_in = jnp.where(live, net.to_rows(share), 0)

    missing = n_keep - net.add_rows(jnp.where(live, kept, 0))
    kept = _keep(net, masks, weights, largest, live, missing, fill=official)
    new = _fill(net, masks, weights, gradients, kept, fan_in, by_index=official)
    if official:
        undo = _zip(own_layouts, new, shapes)
        return [own.from_matrix(mask, shape) for own, mask, shape in undo]
    return new


def _salient(net, masks, weights, gradients, candidate, n_keep, n_drop):
    """Return the largest weights, and the steepest positions of candidate rows."""
    operands = _zip(masks, weights, gradients, net.rows.split(candidate))

    def candidates(_, selected, operands):
        largest = [(weight, mask, mask) for mask, weight, _, _ in operands]
        steepest = [
            (gradient, jnp.broadcast_to(own, gradient.shape), mask)
            for mask, _, gradient, own in operands
        ]
        return largest + steepest

    wanted = jnp.concatenate([n_keep, n_drop])
    like, axes = [*weights, *gradients], [*net.layers.axes] * 2
    found = select(
        candidates, lambda *_: wanted, operands, like, axes, by_magnitude=True
    )
    return found[: len(masks)], found[len(masks) :]


def _keep(net, masks, weights, largest, live, missing, *, fill):
    """Return the largest weights of live rows, as many as had been kept of all.

    The largest of all stay, and the next largest take the place of what is ablated
    and so ``missing``; where these run out, ``fill`` takes inactive positions.
    """
    alive = net.rows.split(live)

    def candidates(_, kept, operands):
        return [
            (masked(mask, weight), (mask | fill) & own & ~taken, mask)
            for (mask, weight, own), taken in _zip(operands, kept)
        ]

    return select(
        candidates,
        lambda *_: missing,
        _zip(masks, weights, alive),
        weights,
        net.layers.axes,
        rounds=jnp.any(missing > 0).astype(jnp.int32),
        start=[mask & own for mask, own in _zip(largest, alive)],
        by_magnitude=True,
    )


def _fill(net, masks, weights, gradients, kept, fan_in, *, by_index):
    """Return masks in which each row has its fan-in: kept weights, then steep ones.

    Where more are kept they are cut to the largest or, ``by_index``, to the first.
    """
    if by_index:
        weights = [jnp.zeros_like(weight) for weight in weights]
    (counts,) = net.row_counts(kept)
    crowded = counts > fan_in
    dtypes = [jnp.result_type(w, g) for w, g in _zip(weights, gradients)]
    like = [jnp.zeros_like(w, dtype) for w, dtype in _zip(weights, dtypes)]
    rows = net.rows.split(crowded), net.rows.split(fan_in > 0)

    def candidates(_, filled, operands):
        """Offer what crowded rows keep, and all that others do not keep."""
        offers = []
        for (mask, weight, gradient, kept, full, own), taken in _zip(operands, filled):
            dtype = jnp.result_type(weight, gradient)
            score = jnp.where(full, weight.astype(dtype), gradient.astype(dtype))
            offers.append((score, jnp.where(full, kept, own) & ~taken, mask))
        return offers

    return select(
        candidates,
        lambda *_: jnp.where(crowded, fan_in, fan_in - counts),
        _zip(masks, weights, gradients, kept, *rows),
        like,
        net.rows.axes,
        start=[x & ~full for x, full in _zip(kept, rows[0])],
        by_magnitude=True,
    )


def _nonzero(mask, weight):
    """Return where active weights are not 0, in integers: denormals are not."""
    keys = keys_of(weight, mask, mask, by_magnitude=True)
    return keys > keys_of(jnp.zeros((), weight.dtype), None, None, by_magnitude=True)


def _zip(*lists):
    return list(zip(*lists, strict=True))
