"""A learned rescaling of a sparse network's first weights."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from sparsejax.masks.layout import named_leaves
from sparsejax.saliency.prune import prune

Loss = Callable[[Any, Any], jax.Array]

_LOSS, _NORM = 0, 1  # what is descended on
_CLIP = 1.0
_DECAY_FIRST, _DECAY_SECOND, _EPSILON = 0.9, 0.999, 1e-8


class _State(NamedTuple):
    """The scales and their Adam; rows are `_LOSS` and `_NORM`."""

    scales: jax.Array  # float32 [tensors]
    first: jax.Array  # float32 [2, tensors]
    second: jax.Array  # float32 [tensors], of both
    counts: jax.Array  # int32 [2]


def rescaled_init(
    loss: Loss,
    params: Any,
    batches: Iterable[Any],
    *,
    masks: Any = None,
    iterations: int = 180,
    learning_rate: float = 1e-2,
    max_norm: float = 1.0,
    step_size: float = 0.1,
    min_scale: float = 0.01,
    simulated: Literal["sgd", "adam"] = "sgd",
    official: bool = False,
) -> Any:
    """Prune first weights, and scale each tensor so that the first step helps most.

    Every tensor has one factor, which starts at 1. Where the norm of the gradient
    exceeds ``max_norm``, the factors descend on that norm; elsewhere on the loss after
    one normalized step along the gradient, which counts as constant. Pruned weights
    stay 0, and tensors that are all 0 stay what they are.

    Args:
      loss: ``(params, batch) -> loss``, a scalar, with hard labels. Norms use the
        statistics of the batch, dropout is off, and what norms would update is
        dropped. The same function is compiled once; a `jax.tree_util.Partial` of it
        too, whatever arrays it holds.
      params: tree of floating-point arrays, of parameters alone, such as
        ``nnx.state(model, nnx.Param)``.
      batches: of training, augmented as there: trees of arrays with a leading axis of
        examples. An iteration takes the gradient on two together, and the loss after
        the step on the first of them and a third.
      masks: tree like ``params`` of bool arrays, ``True`` where a weight is active, and
        None where a leaf is dense; leaves are matched by path. None: nothing is pruned.
      iterations: of the descent.
      learning_rate: of the descent, by Adam.
      max_norm: of the gradient of all parameters, the 2-norm for "sgd" and the 1-norm
        for "adam".
      step_size: of the normalized step.
      min_scale: a factor is at least this; that of a leaf named "bias" at least 0.
      simulated: the normalized step divides the gradient by its norm ("sgd") or takes
        its sign ("adam").
      official: leave the gradient of pruned weights in the norm and in the step, as
        the authors' code does. At high sparsity most of the norm is then that of
        weights that do not exist.

    Returns:
      Tree like ``params``, of the same dtypes.

    Raises:
      ValueError: arguments that cannot be meant; masks of other parameters; too few
        batches; a gradient that is zero or not finite.
      TypeError: a leaf that is not floating-point.

    References:
      Jaiswal et al. 2022, "Training your sparse neural network better with any mask",
      section 3.3; Zhu et al. 2021, "GradInit: learning to initialize neural networks
      for stable and efficient training", algorithm 1. Masking the gradient is ours.

    Example:
      A network with BatchNorm and, were there any, dropout:

      >>> import itertools, jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from sparsejax import recipes, saliency
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(
      ...     nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu,
      ...     nnx.Linear(8, 3, rngs=rngs))
      >>> model.eval()
      >>> model.set_attributes(nnx.BatchNorm, use_running_average=False)
      >>> graphdef, params, others = nnx.split(model, nnx.Param, ...)
      >>> def loss(params, batch):
      ...     logits = nnx.merge(graphdef, params, others, copy=True)(batch["x"])
      ...     losses = optax.softmax_cross_entropy_with_integer_labels
      ...     return losses(logits, batch["y"]).mean()
      >>> batch = {"x": jax.random.normal(jax.random.key(0), (12, 4)),
      ...          "y": jnp.arange(12) % 3}
      >>> masks = saliency.magnitude(params, sparsity=0.5)
      >>> nnx.update(model, recipes.rescaled_init(
      ...     loss, params, itertools.repeat(batch), masks=masks, iterations=3))
      >>> int((model.layers[0].kernel[...] != 0).sum() ==
      ...     masks["layers"][0]["kernel"].sum())
      1
    """
    _check(iterations, learning_rate, max_norm, step_size, min_scale, simulated)
    named = named_leaves(params)
    for path, leaf in named.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"rescaled_init(params): {path} must be floating-point, got "
                f"{leaf.dtype}; give the parameters alone, nnx.state(model, nnx.Param)."
            )
    pruned = prune(params, masks)
    lowest = [0.0 if path.endswith("bias") else min_scale for path in named]
    least = jnp.array(lowest, jnp.float32)
    state = _State(
        scales=jnp.ones(len(named)),
        first=jnp.zeros((2, len(named))),
        second=jnp.zeros(len(named)),
        counts=jnp.zeros(2, jnp.int32),
    )
    active = {} if official else named_leaves(masks)
    stream = _endless(batches)
    loss = loss if isinstance(loss, Partial) else Partial(loss)
    for _ in range(iterations):
        both = [next(stream), next(stream)]
        norm, direction = _direction(
            loss, state.scales, pruned, active, both, simulated
        )
        if not 0 < norm < float("inf"):
            raise ValueError(
                "rescaled_init: the norm of the gradient must be positive and finite, "
                f"got {norm}; look for NaN in the weights and in the batches, and for "
                "layers without active weights."
            )
        at = (loss, state.scales, pruned, direction)
        if norm > max_norm:
            row, derivative = _NORM, _of_norm(*at, both)
        else:
            both = [both[0], next(stream)]
            row, derivative = _LOSS, _of_loss(*at, both, step_size)
        state = _adam(state, row, derivative, learning_rate, least)
    return _scaled(pruned, state.scales)


@functools.partial(jax.jit, static_argnames="simulated")
def _direction(
    loss: Partial,
    scales: jax.Array,
    pruned: Any,
    active: dict[str, jax.Array],
    batches: list[Any],
    simulated: str,
) -> tuple[jax.Array, Any]:
    """Return the norm of the gradient, and the direction of the step along it."""
    gradient = prune(jax.grad(loss)(_scaled(pruned, scales), _joined(batches)), active)
    leaves = [g.astype(jnp.float32) for g in jax.tree.leaves(gradient)]
    if simulated == "adam":
        norm = sum(jnp.abs(g).sum() for g in leaves)
        return jnp.asarray(norm), jax.tree.map(jnp.sign, gradient)
    norm = jnp.sqrt(sum(jnp.square(g).sum() for g in leaves))
    return norm, jax.tree.map(lambda g: (g / norm).astype(g.dtype), gradient)


@jax.jit
def _of_norm(
    loss: Partial, scales: jax.Array, pruned: Any, direction: Any, batches: list[Any]
) -> jax.Array:
    """Return the derivative of the norm by the scales.

    By the weights it is the product of the Hessian, which is symmetric, with the
    direction.
    """
    gradient = lambda weights: jax.grad(loss)(weights, _joined(batches))
    _, by_weights = jax.jvp(gradient, (_scaled(pruned, scales),), (direction,))
    return _products(by_weights, pruned)


@jax.jit
def _of_loss(
    loss: Partial,
    scales: jax.Array,
    pruned: Any,
    direction: Any,
    batches: list[Any],
    step_size: jax.Array,
) -> jax.Array:
    """Return the derivative of the loss after the step, over the size of the step."""
    step = lambda w, d: w - (step_size * d).astype(w.dtype)
    after = jax.tree.map(step, _scaled(pruned, scales), direction)
    return _products(jax.grad(loss)(after, _joined(batches)), pruned) / step_size


@jax.jit
def _adam(
    state: _State,
    row: jax.Array,
    derivative: jax.Array,
    learning_rate: jax.Array,
    least: jax.Array,
) -> _State:
    """Step with first moments and a count of the row, and second moments of both."""
    d = jnp.clip(derivative, -_CLIP, _CLIP)
    new = _DECAY_FIRST * state.first[row] + (1 - _DECAY_FIRST) * d
    second = _DECAY_SECOND * state.second + (1 - _DECAY_SECOND) * jnp.square(d)
    counts = state.counts.at[row].add(1)
    mean = new / (1 - _DECAY_FIRST ** counts[row])
    deviation = jnp.sqrt(second / (1 - _DECAY_SECOND ** counts.sum()))
    scales = state.scales - learning_rate * mean / (deviation + _EPSILON)
    first = state.first.at[row].set(new)
    return _State(jnp.maximum(scales, least), first, second, counts)


def _scaled(params: Any, scales: jax.Array) -> Any:
    leaves, treedef = jax.tree.flatten(params)
    pairs = zip(leaves, scales, strict=True)
    return treedef.unflatten([(x * scale).astype(x.dtype) for x, scale in pairs])


def _products(a: Any, b: Any) -> jax.Array:
    """Return the inner product of each pair of leaves, float32 [tensors]."""
    product = lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32))
    return jnp.stack(jax.tree.leaves(jax.tree.map(product, a, b)))


def _joined(batches: list[Any]) -> Any:
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *batches)


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    yield from batches
    raise ValueError(
        "rescaled_init(batches) ran out: an iteration takes up to three batches. "
        "itertools.cycle goes through them again, or give fewer iterations=."
    )


def _check(iterations, learning_rate, max_norm, step_size, min_scale, simulated):
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(
            "rescaled_init(iterations=...) must be an integer of at least 1, got "
            f"{iterations!r}."
        )
    positive = dict(learning_rate=learning_rate, max_norm=max_norm, step_size=step_size)
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"rescaled_init({name}=...) must be above 0, got {value}.")
    if not 0 <= min_scale <= 1:
        raise ValueError(
            f"rescaled_init(min_scale=...) must lie in [0, 1], got {min_scale}."
        )
    if simulated not in ("sgd", "adam"):
        raise ValueError(
            f'rescaled_init(simulated=...) must be "sgd" or "adam", got {simulated!r}.'
        )
