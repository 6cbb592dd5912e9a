"""SRigL: RigL in which live neurons have one fan-in, and the others are ablated."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax._request import Request
from sparsejax._trees import tree_at
from sparsejax.distributions import Distribution
from sparsejax.masks import fan_in
from sparsejax.masks.coupled import coupled_masks, live_channels
from sparsejax.masks.initial import auto_sharding
from sparsejax.masks.layout import Layout, Leaf, Where, named_leaves
from sparsejax.schedules import Schedule, share
from sparsejax.sparse_optax._ablation import (
    Protect,
    checked_groups,
    checked_protect,
    emitted_leaves,
    protected_leaves,
)
from sparsejax.sparse_optax._dynamic import Dynamic, dynamic_transformation


class FanInBudgets(NamedTuple):
    """What the sparse weights, or the layers stacked in each, keep: trees of int32."""

    weights: Any  # the fan-in is this over the number of live neurons
    thresholds: Any  # salient weights that a neuron needs; 0: none is ablated


def srigl(
    inner: optax.GradientTransformation | None = None,
    *,
    sparsity: float,
    gamma: float = 0.3,
    protect: Protect = None,
    groups: Any = None,
    revive: bool = True,
    official: bool = False,
    distribution: str | Distribution = "erk",
    where: Where = None,
    layout: Mapping[str, Layout] | None = None,
    key: jax.Array | None = None,
    drop_fraction: float | Schedule = 0.3,
    start_at: int = 0,
    update_every: int = 100,
    stop_at: int | None = None,
    step_on_update: bool = True,
    accumulate: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Train a sparse network in which all live neurons of a layer have one fan-in.

    As `rigl`, but weights grow neuron by neuron, and neurons with too few salient
    weights are ablated: what they held goes to the others. A neuron is what `Layout`
    says: an output channel of a convolution, a dimension of a head of a query. See
    `sparsejax.masks.fan_in.update` for what a change of masks does.

    Of a leaf's budget the ``budget % neurons`` last weights remain unused.

    Args:
      inner: as in `rigl`.
      sparsity: as in `rigl`.
      gamma: a neuron is ablated when fewer than this fraction of its fan-in before any
        ablation are salient; from 1 on, this number. 0 ablates nothing. The paper has
        0.3 for convolutions and 0.95 for vision transformers.
      protect: regex, or several, on paths, or predicate on (path, leaf): leaves of
        which no neuron is ablated. The output layer must be among them, or it loses
        classes. None: what ``groups`` pin or, without them, what is called ``head``,
        ``fc``, ``classifier``, ``logits``, ``output``, ``readout`` or
        ``predictions``. An empty tuple protects nothing.
      groups: what `sparsejax.compaction.channel_groups` returns, or its groups. Layers
        that produce pinned channels are protected, too. What else an ablated channel
        emits is masked with it, in parameters and optimizer slots: biases, and scales
        and shifts of norms. `get_masks` then has masks for these vectors, all active
        at first, which count in no budget. A channel into which several layers write
        is masked when all of its neurons are ablated. Without groups, biases and norms
        of ablated neurons go on training.
      revive: whether ablated neurons may live again, as in the authors' repository, or
        never, as in their later library, sparsimony; see
        `sparsejax.masks.fan_in.update`. With ``groups``, a neuron whose scale is
        masked, or that ends in a ReLU, gets no gradient and so stays ablated.
      official: reproduce the authors' repository, defects included; see
        `sparsejax.masks.fan_in.update`.
      distribution: as in `rigl`.
      where: as in `rigl`.
      layout: as in `rigl`.
      key: as in `rigl`.
      drop_fraction: as in `rigl`.
      start_at: as in `rigl`.
      update_every: as in `rigl`.
      stop_at: as in `rigl`.
      step_on_update: as in `rigl`.
      accumulate: as in `rigl`.

    Returns:
      An optax transformation with a `SparseState`, whose budgets are `FanInBudgets`:
      states of different ``gamma`` and sparsity stack and run under one `jax.vmap`.

    Raises:
      ValueError, TypeError: as `rigl`; a pattern that protects nothing, no output layer
        by a usual name, groups of other parameters, or less than one weight a neuron,
        at ``init``.

    References:
      Lasby et al. 2024, "Dynamic sparse training with structured sparsity".

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from sparsejax import sparse_optax
      >>> params = {"hidden": {"kernel": jnp.ones((8, 8))},
      ...           "head": {"kernel": jnp.ones((8, 4))}}
      >>> tx = sparse_optax.srigl(optax.sgd(0.1), sparsity=0.75, gamma=0.3)
      >>> masks = sparse_optax.get_masks(tx.init(params))
      >>> masks["hidden"]["kernel"].sum(axis=0).tolist()
      [1, 1, 1, 1, 1, 1, 1, 1]
    """
    arguments = Dynamic(
        sparsity,
        distribution,
        where,
        layout,
        key,
        drop_fraction,
        start_at,
        update_every,
        stop_at,
        step_on_update,
        accumulate,
    )
    request = Request("srigl", sparsity, distribution, where, layout).check()
    _check_gamma(gamma)
    protect = checked_protect(protect)
    groups = checked_groups(groups)

    def start(params, key):
        named, leaves = named_leaves(params), request.leaves(params)
        protected = protected_leaves(named, protect, groups, gamma)
        with jax.ensure_compile_time_eval():  # they are facts, compiled or not
            kept = {p: np.asarray(n) for p, n in request.budgets(leaves).items()}
        masks = _drawn(key, named, leaves, kept)
        ablatable = set(leaves) - protected
        for path in emitted_leaves(named, groups, ablatable) - set(leaves):
            masks[path] = jnp.ones_like(named[path], dtype=bool)
        thresholds = {
            path: _thresholds(leaf, kept[path], gamma if path in ablatable else 0)
            for path, leaf in leaves.items()
        }
        budgets = (jax.tree.map(jnp.asarray, x) for x in (kept, thresholds))
        trees = (tree_at(params, by_path) for by_path in budgets)
        return tree_at(params, masks), FanInBudgets(*trees)

    def update(leaves, masks, now, fraction):
        kept, thresholds = (named_leaves(tree) for tree in now.budgets)
        sparse = [i for i, leaf in enumerate(leaves) if leaf.path in kept]
        own = lambda values: [values[i] for i in sparse]
        new = fan_in.update_all(
            own(masks),
            own(now.weights),
            own(now.gradients),
            n_drop=lambda active: share(active, fraction),
            budgets=[*kept.values()],
            thresholds=[*thresholds.values()],
            layouts=[leaf.layout for leaf in own(leaves)],
            revive=revive,
            official=official,
        )
        paths = [leaf.path for leaf in leaves]
        changed = dict(zip(own(paths), new, strict=True))
        others = {p: m for p, m in zip(paths, masks, strict=True) if p not in changed}
        live = {group.name: live_channels(group, changed) for group in groups}
        changed |= others | coupled_masks(groups, live, others, ["norm"])
        return [changed[path] for path in paths]

    return dynamic_transformation(
        "srigl", inner, arguments, start, update, needs_gradient=True
    )


def _drawn(
    key: jax.Array,
    named: Mapping[str, jax.Array],
    leaves: Mapping[str, Leaf],
    kept: Mapping[str, np.ndarray],
) -> dict[str, jax.Array]:
    """Draw the first masks, sharded as the leaves are."""
    weights = [named[path] for path in leaves]
    draw = _drawer(
        tuple(leaves),
        tuple(leaf.layout for leaf in leaves.values()),
        tuple(auto_sharding(weight) for weight in weights),
    )
    masks = draw(key, weights, [_fan_in(x, kept[path]) for path, x in leaves.items()])
    return dict(zip(leaves, masks, strict=True))


@functools.lru_cache(maxsize=64)
def _drawer(names, layouts, shardings):
    """Return `sparsejax.masks.fan_in.random_masks`, compiled."""
    draw = lambda key, weights, k: fan_in.random_masks(key, names, weights, k, layouts)
    if all(sharding is None for sharding in shardings):
        return jax.jit(draw)
    return jax.jit(draw, out_shardings=list(shardings))


def _fan_in(leaf: Leaf, kept: np.ndarray) -> np.ndarray:
    """Return the fan-in while no neuron is ablated, for each layer that is stacked."""
    neurons = leaf.layout.layer_shape(leaf.shape)[0]
    if (kept < neurons).any():
        raise ValueError(
            f"srigl: every neuron must have a weight, and {leaf.path} would keep "
            f"{kept.min()} for its {neurons} neurons. Lower the sparsity, or give this "
            f"leaf one of its own by where={{{leaf.path!r}: ...}}, 0 for dense."
        )
    return kept // neurons


def _thresholds(leaf: Leaf, kept: np.ndarray, gamma: float) -> np.ndarray:
    """Return how many weights of a neuron must be salient; 0 where layers are dense."""
    size = math.prod(leaf.layout.layer_shape(leaf.shape)[1:])
    found = [
        min(fan_in.ablation_threshold(gamma, k), size + 1) if k < size else 0
        for k in _fan_in(leaf, kept).ravel().tolist()
    ]
    return np.array(found, np.int32).reshape(kept.shape)


def _check_gamma(gamma: float) -> None:
    try:
        fan_in.ablation_threshold(gamma, 1)
    except ValueError as error:
        raise ValueError(f"srigl(gamma=...): {error}") from None
