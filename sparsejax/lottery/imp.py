"""Iterative magnitude pruning: train, prune, go back to an early snapshot, repeat."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from sparsejax._request import Scope
from sparsejax._trees import check_same_leaves, first_difference, tree_at
from sparsejax.masks.layout import (
    Layout,
    Where,
    layouts_of,
    named_leaves,
    select_leaves,
)
from sparsejax.masks.unstructured import prune_all, prune_together
from sparsejax.schedules import share

# Whatever a train function needs to go on from: parameters, the statistics of norms,
# an optimizer's state if it is to be taken up again. A tree of arrays.
State = Any
Train = Callable[[State, Any, int], tuple[State, State | None]]

_OWNER = "iterative_magnitude_pruning"


class Round(NamedTuple):
    """A round of `iterative_magnitude_pruning`, when it is over.

    Attributes:
      index: how many times the weights were pruned before it.
      masks: that it was trained under, a tree like the parameters; all True in round 0,
        None where a leaf is dense.
      state: what training ended with.
      snapshot: what later rounds start from.
    """

    index: int
    masks: Any
    state: State
    snapshot: State


def iterative_magnitude_pruning(
    train: Train,
    state: State,
    *,
    rounds: int,
    rate: float = 0.2,
    scope: Scope = "global",
    where: Where = None,
    layout: Mapping[str, Layout] | None = None,
    params_of: Callable[[State], Any] = lambda state: state,
    resume: Round | None = None,
) -> Iterator[Round]:
    """Train, prune the weights of least magnitude, go back to a snapshot, and repeat.

    Round 0 trains the whole network from ``state``. Each later round trains from the
    snapshot, under the masks of the round before without the fraction ``rate`` of their
    weights: those that are smallest at its end. Density after q prunings is
    ``(1 - rate) ** q``.

    How to train is the business of ``train(state, masks, index)``, called once a round.
    It returns what training ends with and, in round 0, a snapshot from its early steps,
    the state to go back to; None goes back to ``state`` itself, and from round 1 on it
    is not read. It

    - makes an optimizer, as ``sparse_optax.static(inner, masks=masks)``, and so decides
      whether its momentum starts empty, as in the paper, or is part of the state;
    - starts the schedule of the learning rate afresh in every round, as the released
      code does, or where the snapshot was taken, as the paper's algorithm says: round
      0 starts at step 0 in any case, and ``index`` tells;
    - may donate the state, which is a copy, equal to the snapshot in every bit of
      every leaf. Weights off the mask are in it, too: `sparse_optax.apply_masks`, or
      the first update, sets them to 0.

    Args:
      train: see above.
      state: what round 0 starts from.
      rounds: how many prunings there are: rounds 0 to ``rounds`` are trained.
      rate: fraction of the weights left that a pruning removes, in [0, 1), rounded to
        the nearest number of weights.
      scope: "global" ranks the weights of all sparse leaves together, "layer" those of
        each layer by itself.
      where: which leaves are pruned, by path; see `sparsejax.masks.select_leaves`. A
        dict may only say 0. The paper's are convolutions but for the first of a
        ResNet: ``lambda path, w: w.ndim == 4 and "stem" not in path``.
      layout: dict from path regex to `sparsejax.masks.Layout`, for stacked layers.
      params_of: finds the parameters in a state; masks are a tree like them.
      resume: the last round that is done, as `restore_round` reads it; the next one is
        trained first, and ``state`` is not trained again.

    Yields:
      A `Round` as soon as it is trained; `save_round` makes it a checkpoint.

    Raises:
      ValueError: arguments that cannot be meant; a train function that returns another
        tree, or weights that are not 0 off the masks.
      TypeError: a leaf that cannot be pruned, or a train function that returns no pair.

    References:
      Frankle et al. 2020, "Linear mode connectivity and the lottery ticket hypothesis",
      algorithm 2; Chen et al. 2022, "Coarsening the granularity", section 3.1.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import lottery
      >>> def train(params, masks, index):
      ...     trained = jnp.where(masks["w"], params["w"] + 1.0, 0.0)
      ...     return {"w": trained}, {"w": params["w"] + 0.5}
      >>> params = {"w": jnp.array([[0.0, 1.0], [2.0, 3.0]])}
      >>> found = lottery.iterative_magnitude_pruning(
      ...     train, params, rounds=2, rate=0.25)
      >>> [(round.index, round.state["w"].tolist()) for round in found]
      [(0, [[1.0, 2.0], [3.0, 4.0]]), (1, [[0.0, 2.5], [3.5, 4.5]]),
       (2, [[0.0, 0.0], [3.5, 4.5]])]
    """
    _check(rounds, rate, scope, where)
    params = params_of(state)
    leaves, named = (
        select_leaves(params, where=where, layout=layout),
        named_leaves(params),
    )
    full = {path: jnp.ones_like(named[path], dtype=bool) for path in leaves}
    pruned = jax.jit(partial(prune, rate=rate, scope=scope, layout=layout))
    start = Round(-1, tree_at(params, full), state, state)
    if resume is not None:
        _check_same_state("resume=...", state, resume.snapshot)
        check_same_leaves(f"{_OWNER}(resume=...)", params, resume.masks)
        _check_same_choice(leaves, named_leaves(resume.masks))

    def next_round(last: Round) -> Round:
        index, masks, snapshot = last.index + 1, last.masks, last.snapshot
        if index > 0:
            masks = pruned(masks, params_of(last.state))
        trained, early = _pair(train(_copied(snapshot), masks, index))
        _check_same_state(f"train(..., index={index})", snapshot, trained)
        _check_masked(params_of(trained), masks, index)
        if index == 0 and early is not None:
            _check_same_state("the snapshot of round 0", snapshot, early)
            snapshot = early
        return Round(index, masks, trained, snapshot)

    def run() -> Iterator[Round]:
        last = resume or start
        while last.index < rounds:
            last = next_round(last)
            yield last

    return run()


def prune(
    masks: Any,
    params: Any,
    *,
    rate: chex.Numeric = 0.2,
    scope: Scope = "global",
    layout: Mapping[str, Layout] | None = None,
) -> Any:
    """Remove a fraction of the active weights, those of least magnitude.

    Can be compiled; no shape depends on the rate.

    Args:
      masks: tree of bool arrays, and None where a leaf is dense.
      params: tree of the same leaves. Ties go to the first leaf and there to the lowest
        index; a NaN counts as 0.
      rate: fraction of the active weights that goes, in [0, 1), to the nearest number;
        traced or not.
      scope: "global" ranks all weights together; "layer" those of each layer, and takes
        the fraction of each.
      layout: dict from path regex to `sparsejax.masks.Layout`, for stacked layers.

    Returns:
      Masks, each a subset of the one given.

    Raises:
      ValueError: arguments that cannot be meant, or masks of another tree.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import lottery
      >>> params = {"a": jnp.array([[1.0, -5.0, 0.0]]), "b": jnp.array([[3.0], [0.5]])}
      >>> masks = {"a": jnp.array([[True, True, False]]), "b": jnp.ones((2, 1), bool)}
      >>> masks = lottery.prune(masks, params, rate=0.5)
      >>> masks["a"].tolist(), masks["b"].tolist()
      ([[False, True, False]], [[True], [False]])
    """
    _check_rate("prune", rate, scope)
    check_same_leaves("prune(masks)", params, masks)
    named, leaves = named_leaves(masks), named_leaves(params)
    layouts = layouts_of(params, layout)
    own = list(named.values())
    weights = [leaves[path] for path in named]
    if scope == "global":
        dtype = jnp.result_type(*weights)
        weights = [weight.astype(dtype) for weight in weights]
        active = sum((jnp.sum(m, dtype=jnp.int32) for m in own), jnp.int32(0))
        pruned = prune_together(own, weights, _left(active, rate))
    else:
        axes = [layouts[path].layer_axes(leaves[path].ndim) for path in named]
        active = [
            jnp.sum(mask, axis=over, dtype=jnp.int32)
            for mask, over in zip(own, axes, strict=True)
        ]
        left = [_left(n, rate) for n in active]
        pruned = prune_all(own, weights, k=left, axes=axes)
    return tree_at(params, dict(zip(named, pruned, strict=True)))


def _left(active: jax.Array, rate: chex.Numeric) -> jax.Array:
    """Return ``active - round(rate * active)`` in integers."""
    return active - (share(2 * active.astype(jnp.uint32), rate) + 1) // 2


def _copied(state: State) -> State:
    """Return a state whose arrays may be donated."""
    return jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, state)


def _pair(returned: Any) -> tuple[State, State | None]:
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise TypeError(
            f"{_OWNER}: train(state, masks, index) must return a pair, the state that "
            "training ends with and a snapshot or None, got "
            f"{type(returned).__name__}."
        )
    return returned


def _check(rounds: Any, rate: Any, scope: Any, where: Where) -> None:
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
        raise ValueError(
            f"{_OWNER}(rounds=...) must be an integer of at least 0, got {rounds!r}."
        )
    _check_rate(_OWNER, rate, scope)
    if isinstance(where, Mapping) and any(where.values()):
        raise ValueError(
            f"{_OWNER}(where=...): all leaves are pruned at one rate=, so a dict may "
            f"only leave some dense by 0, got {where}."
        )


def _check_rate(owner: str, rate: Any, scope: Any) -> None:
    if isinstance(rate, int | float) and not 0 <= rate < 1:
        raise ValueError(
            f"{owner}(rate=...) is the fraction of active weights that is pruned and "
            f"must lie in [0, 1), got {rate!r}."
        )
    if scope not in ("global", "layer"):
        raise ValueError(
            f'{owner}(scope=...) must be "global" or "layer", got {scope!r}.'
        )


def _check_same_choice(leaves: Iterable[str], masked: Iterable[str]) -> None:
    """Raise ValueError unless the masks of a round are those of the leaves to prune."""
    if differing := sorted(set(leaves) ^ set(masked)):
        raise ValueError(
            f"{_OWNER}(resume=...) must be a round with masks for the leaves that "
            "where= selects, got one without, or one that is not selected, for "
            f"{', '.join(differing)}; pass the where= of that round."
        )


def _check_same_state(what: str, state: State, other: State) -> None:
    """Raise ValueError unless two states are trees of the same arrays."""
    about = lambda tree: {
        path: (jnp.shape(x), str(jnp.result_type(x)))
        for path, x in named_leaves(tree).items()
    }
    if differing := first_difference(about(state), about(other)):
        path, ours, theirs = differing
        raise ValueError(
            f"{_OWNER}: {what} must be a state like the first one, and {path} is "
            f"{theirs} in it instead of {ours}."
        )


def _check_masked(params: Any, masks: Any, index: int) -> None:
    """Raise ValueError unless the weights off the masks are 0."""
    weights = named_leaves(params)
    for path, mask in named_leaves(masks).items():
        off = int(jnp.sum(~mask & (weights[path] != 0)))
        if off:
            raise ValueError(
                f"{_OWNER}: train(..., index={index}) must leave weights off the masks "
                f"at 0, and {off} of {path} are not; train under "
                "sparse_optax.static(inner, masks=masks), or with "
                "sparse_optax.apply_masks."
            )
