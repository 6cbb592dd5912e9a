"""What the contract of sparse training is tested over: algorithms, optimizers, trees.

An algorithm joins every test of the contract by one line in `ALGORITHMS`. All run on
one schedule; the counts that they should keep come from ``oracles``.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.tree_util import keystr

from sparsejax import schedules, sparse_optax
from sparsejax.masks import NM, Block

SPARSITY = 0.6
PERIOD = dict(start_at=3, update_every=2, stop_at=8)
EVENTS = (4, 6)
STEPS = 10
NAN_STEP = 5

Layers = Mapping[str, tuple[int, ...]]


# Algorithms


class Algorithm(NamedTuple):
    """A factory with its options, and what it should do to the masks.

    ``build(inner, **options)``; the masks change at ``events`` alone. ``prunes``:
    they shrink from dense. ``together``: leaves share one budget. ``skips``: the
    optimizer does not step at an event. ``one_fan_in``: all neurons of a leaf have it,
    and what is left over of its budget is not used. ``surplus``: what leaves that
    share the budgets of all hold beyond them after each event, as a fraction of all
    weights. ``pattern``: of a leaf by its path and shape.
    """

    build: Callable[..., optax.GradientTransformationExtraArgs]
    events: tuple[int, ...] = EVENTS
    prunes: bool = False
    together: bool = False
    skips: bool = False
    needs_gradient: bool = False
    one_fan_in: bool = False
    surplus: tuple[float, ...] = ()
    pattern: Callable[..., NM | Block | None] = lambda path, shape: None


def _with(factory, **options):
    return functools.partial(factory, sparsity=SPARSITY, **options)


COSINE = dict(PERIOD, drop_fraction=0.6)
# This fraction does not end of itself where the period does.
CONSTANT = dict(PERIOD, drop_fraction=schedules.constant_drop(0.3))
HALF = dict(PERIOD, drop_fraction=schedules.constant_drop(0.5))
SKIP = dict(CONSTANT, accumulate=2, step_on_update=False)
_static, _set = sparse_optax.static, sparse_optax.set
_rigl, _magnitude = sparse_optax.rigl, sparse_optax.magnitude
_srigl, _chase = sparse_optax.srigl, sparse_optax.chase
SURPLUS = 0.05
# Without groups, which belong to one tree each: no channel is removed.
SOFT = dict(
    PERIOD,
    channel_sparsity=0.0,
    groups=(),
    soft_extra=schedules.constant_drop(SURPLUS),
    stop_soft_at=5,
)


def _groups(path, shape):
    """Choose 1:2 where it fits; what is called so follows the sparsity asked for."""
    fits = shape[-2] % 2 == 0 and not any(name in path for name in ("fc", "stack"))
    return NM(1, 2) if fits else None


def _blocks(path, shape):
    """Choose blocks of 2 x 2 where they fit."""
    return Block(2, 2) if shape[-1] % 2 == shape[-2] % 2 == 0 else None


ALGORITHMS = {
    "static": Algorithm(_with(_static), events=()),
    "set": Algorithm(_with(_set, **CONSTANT)),
    "rigl": Algorithm(_with(_rigl, **COSINE), needs_gradient=True),
    "rigl_skip": Algorithm(_with(_rigl, **SKIP), skips=True, needs_gradient=True),
    "srigl": Algorithm(
        # No neuron is ablated, so that the counts are known beforehand.
        _with(_srigl, gamma=0.0, **HALF),
        needs_gradient=True,
        one_fan_in=True,
    ),
    "chase": Algorithm(
        _with(_chase, **SOFT),
        needs_gradient=True,
        together=True,
        surplus=(SURPLUS, 0.0),
    ),
    "magnitude": Algorithm(_with(_magnitude, **PERIOD), prunes=True),
    "global": Algorithm(
        _with(_magnitude, scope="global", **PERIOD), prunes=True, together=True
    ),
    "rigl_groups": Algorithm(
        _with(_rigl, pattern=_groups, **HALF), needs_gradient=True, pattern=_groups
    ),
    "set_blocks": Algorithm(_with(_set, pattern=_blocks, **HALF), pattern=_blocks),
}


# Those that compile longest leave some combinations to the slow tests.
LONG = ("srigl", "chase", "rigl_groups", "set_blocks")


def marks(algorithm: str):
    """Return the marks of a combination that only the slow tests need to have."""
    return [pytest.mark.slow] if algorithm in LONG else []


def active_after(algorithm: Algorithm, layers: Layers, count: int) -> dict[str, int]:
    """Count the weights active after ``count`` calls, per leaf or under ``""``."""
    sizes = {path: math.prod(shape) for path, shape in layers.items()}
    patterns = {p: algorithm.pattern(p, (*s[2:], *s[1::-1])) for p, s in layers.items()}
    groups = {p: x for p, x in patterns.items() if isinstance(x, NM)}
    kept = oracles.erk({p: s for p, s in layers.items() if p not in groups}, SPARSITY)
    kept |= {p: sizes[p] // x.m * x.n for p, x in groups.items()}
    areas = {p: x.area for p, x in patterns.items() if isinstance(x, Block)}
    kept |= {p: max(kept[p] // area, 1) * area for p, area in areas.items()}
    if algorithm.one_fan_in:
        kept = {p: n - n % layers[p][0] for p, n in kept.items()}
    done = [event for event in algorithm.events if event < count]
    if algorithm.surplus:
        extra = oracles.exact(algorithm.surplus[len(done) - 1] if done else 0.0)
        return {"": sum(kept.values()) + math.floor(sum(sizes.values()) * extra)}
    if algorithm.together:
        sizes = {"": sum(sizes.values())}
        kept = oracles.uniform({"": (sizes[""],)}, SPARSITY)
    if not algorithm.prunes:
        return kept
    if not done:
        return sizes
    start_at, last = PERIOD["start_at"], algorithm.events[-1]
    progress = oracles.cubic_progress(done[-1], start_at, last)
    return {p: n - math.floor((n - kept[p]) * progress) for p, n in sizes.items()}


# Optimizers


class Optimizer(NamedTuple):
    """An optimizer around, inside or beside which an algorithm runs.

    ``build(sparse)`` makes the transformation from ``sparse(inner)``. ``inner`` is
    what the algorithm is around, where that is all. ``elementwise``: a weight's step
    depends on no other weight. ``slots``: arrays that it keeps for a matrix.
    ``empty``: what a slot that saw no gradient may hold. ``narrow``: it keeps to the
    16 bits of a leaf. ``forgets_nan``: a NaN gradient does not stay with it for good.
    """

    build: Callable[[Callable], optax.GradientTransformation]
    inner: Any = None
    slots: int = 2
    elementwise: bool = True
    empty: float = 0.0
    calls_per_step: int = 1
    narrow: bool = True
    forgets_nan: bool = True
    is_sparse: Callable[[tuple[int, ...]], bool] = lambda shape: True


def _around(inner, slots, **facts):
    return Optimizer(lambda sparse: sparse(inner), inner, slots, **facts)


def _is_matrix(shape):
    return len(shape) == 2


def _partition(sparse):
    """Train matrices sparsely by Muon, all else densely by AdamW."""
    label = lambda x: "matrices" if _is_matrix(x.shape) else "others"
    return optax.partition(
        {"matrices": sparse(optax.contrib.muon(0.02)), "others": _adamw(0.02)},
        lambda params: jax.tree.map(label, params),
    )


_adamw = functools.partial(optax.adamw, eps=1e-4)  # float16 has no 1e-8
OPTIMIZERS = {
    "sgd": _around(optax.sgd(0.1), 0),
    "momentum": _around(optax.sgd(0.1, momentum=0.9, nesterov=True), 1),
    "adamw": _around(_adamw(0.02, weight_decay=0.01), 2),
    "lion": _around(optax.lion(0.02), 1),
    # It adds 1e-30 to the squared gradient, of weights off the mask too; in float16
    # that is 0, by which it divides.
    "adafactor": _around(
        optax.adafactor(0.02), 1, elementwise=False, empty=1.1e-30, narrow=False
    ),
    "muon": _around(optax.contrib.muon(0.02), 1, elementwise=False),
    "muon_in_partition": Optimizer(_partition, slots=1, is_sparse=_is_matrix),
    "multisteps_inside": _around(optax.MultiSteps(_adamw(0.02), 2), 3),
    "multisteps_around": Optimizer(
        lambda sparse: optax.MultiSteps(sparse(_adamw(0.02)), 2),
        calls_per_step=2,
        forgets_nan=False,
    ),
    "hyperparams_inside": _around(
        optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(0.02, 0.01, 5)),
        2,
        narrow=False,
    ),
    "hyperparams_around": Optimizer(
        lambda sparse: optax.inject_hyperparams(
            lambda learning_rate: sparse(_adamw(learning_rate))
        )(learning_rate=0.02)
    ),
}


# Trees. Every sparse leaf has a shape of its own, by which its slots are found.


def _draw(rng, shape, dtype):
    return jnp.asarray(rng.choice([-1, 1], shape) * rng.uniform(0.25, 1, shape), dtype)


class Bare:
    """A dict of arrays and a plain loop, with a dense bias and leaves of 16 bits.

    At `NAN_STEP` every other gradient off the mask is NaN.
    """

    layers = {
        "conv/kernel": (4, 2, 3, 3),
        "fc/kernel": (6, 8),
        "half/kernel": (5, 6),
        "head/kernel": (3, 2),  # so small that ERK makes it dense
        "short/kernel": (9, 5),
    }

    def __init__(self, tx, optimizer):
        rng = np.random.default_rng(0)
        shapes = {
            "conv": {"kernel": (3, 3, 2, 4)},
            "embed": {"embedding": (7, 3)},
            "fc": {"kernel": (8, 6), "bias": (6,)},
            "half": {"kernel": (6, 5)},
            "head": {"kernel": (2, 3)},
            "short": {"kernel": (5, 9)},
        }
        narrow = {"half": jnp.bfloat16, "short": jnp.float16}
        dtypes = narrow if optimizer.narrow else {}

        def draw(*leading):
            return {
                module: {
                    name: _draw(rng, (*leading, *s), dtypes.get(module, jnp.float32))
                    for name, s in leaves.items()
                }
                for module, leaves in shapes.items()
            }

        self.params = draw()
        self.opt_state = tx.init(self.params)
        self.params = sparse_optax.apply_masks(self.params, self.opt_state)
        self.call = jnp.int32(0)
        self.table = draw(STEPS * optimizer.calls_per_step)
        self.traces = 0

        @jax.jit
        def step(params, opt_state, call, table):
            self.traces += 1
            nan_now = (call == NAN_STEP) & optimizer.forgets_nan

            def spoil(mask, gradients):
                gradient = gradients[call]
                if mask is None:
                    return gradient
                even = jnp.arange(gradient.size).reshape(gradient.shape) % 2 == 0
                return jnp.where(nan_now & even & ~mask, jnp.nan, gradient)

            masks = sparse_optax.get_masks(opt_state)
            grads = jax.tree.map(spoil, masks, table, is_leaf=lambda x: x is None)
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            return params, opt_state, call + 1, grads

        self._step = step

    def step(self):
        """Take a step and return its gradients."""
        carry = self.params, self.opt_state, self.call
        self.params, self.opt_state, self.call, grads = self._step(*carry, self.table)
        return grads


def _batch():
    rng = np.random.default_rng(0)
    tokens, classes = rng.integers(0, 7, (16, 5)), rng.integers(0, 3, 16)
    return jnp.asarray(tokens), jnp.asarray(classes)


def _loss(logits, classes):
    return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()


class _NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 6, rngs=rngs)
        self.conv = nnx.Conv(6, 4, (3,), rngs=rngs)
        self.hidden = nnx.Linear(4, 9, rngs=rngs)
        self.norm = nnx.LayerNorm(9, rngs=rngs)
        self.head = nnx.Linear(9, 3, rngs=rngs)

    def __call__(self, tokens):
        x = self.conv(self.embed(tokens)).mean(1)
        return self.head(jnp.tanh(self.norm(self.hidden(x))))


class Nnx:
    """An NNX model and `nnx.Optimizer`."""

    layers = {"conv/kernel": (4, 6, 3), "head/kernel": (3, 9), "hidden/kernel": (9, 4)}

    def __init__(self, tx, optimizer):
        self.model = _NnxModel(nnx.Rngs(0))
        self.optimizer = nnx.Optimizer(self.model, tx, wrt=nnx.Param)
        params = nnx.state(self.model, nnx.Param)
        nnx.update(
            self.model, sparse_optax.apply_masks(params, self.optimizer.opt_state)
        )
        self.batch = _batch()
        self.traces = 0

        @nnx.jit
        def step(model, optimizer, tokens, classes):
            self.traces += 1
            grads = nnx.grad(lambda model: _loss(model(tokens), classes))(model)
            optimizer.update(model, grads)
            return grads

        self._step = step

    def step(self):
        """Take a step and return its gradients."""
        return nnx.as_pure(self._step(self.model, self.optimizer, *self.batch))

    @property
    def params(self):
        """The parameters, bare."""
        return nnx.as_pure(nnx.state(self.model, nnx.Param))

    @property
    def opt_state(self):
        """The state of the optimizer, bare."""
        return nnx.as_pure(self.optimizer.opt_state)


class _LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(7, 6, name="embed")(tokens)
        x = nn.Conv(4, (3,), name="conv")(x).mean(1)
        x = nn.LayerNorm(name="norm")(nn.Dense(9, name="hidden")(x))
        return nn.Dense(3, name="head")(jnp.tanh(x))


class Linen:
    """A Linen model and Flax's ``TrainState``."""

    layers = Nnx.layers

    def __init__(self, tx, optimizer):
        model = _LinenModel()
        self.batch = _batch()
        params = model.init(jax.random.key(0), self.batch[0])["params"]
        train = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        params = sparse_optax.apply_masks(params, train.opt_state)
        # A Python integer would be another type than what a step returns.
        self.train = train.replace(params=params, step=jnp.int32(0))
        self.traces = 0

        @jax.jit
        def step(train, tokens, classes):
            self.traces += 1
            logits = lambda params: train.apply_fn({"params": params}, tokens)
            grads = jax.grad(lambda params: _loss(logits(params), classes))(
                train.params
            )
            return train.apply_gradients(grads=grads), grads

        self._step = step

    def step(self):
        """Take a step and return its gradients."""
        self.train, grads = self._step(self.train, *self.batch)
        return grads

    @property
    def params(self):
        """The parameters."""
        return self.train.params

    @property
    def opt_state(self):
        """The state of the optimizer."""
        return self.train.opt_state


TREES = {"bare": Bare, "nnx": Nnx, "linen": Linen}


# Runs


class Snapshot(NamedTuple):
    """What a call leaves behind: trees of host arrays."""

    params: Any
    masks: Any
    grads: Any  # that the call was given
    state: sparse_optax.SparseState


class Run(NamedTuple):
    """A run: the state before it and after every call."""

    layers: Layers
    snapshots: list[Snapshot]
    traces: int


def train(algorithm: Algorithm, optimizer: Optimizer, tree: Callable) -> Run:
    """Train over the whole schedule; nothing may go between host and device."""
    loop = tree(optimizer.build(algorithm.build), optimizer)
    snapshots = [_look(loop, None)]
    for _ in range(STEPS * optimizer.calls_per_step):
        with jax.transfer_guard("disallow"):
            grads = loop.step()
        snapshots.append(_look(loop, grads))
    layers = {p: s for p, s in loop.layers.items() if optimizer.is_sparse(s)}
    return Run(layers, snapshots, loop.traces)


def sparse_states(opt_state: Any) -> list[sparse_optax.SparseState]:
    """Return every state of a sparse transformation in an optimizer's state."""
    is_state = lambda x: isinstance(x, sparse_optax.SparseState)
    return [x for x in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(x)]


def by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree of dicts by path, with None where there is none."""
    leaves, _ = jax.tree.flatten_with_path(tree, is_leaf=lambda x: x is None)
    return {keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _look(loop, grads) -> Snapshot:
    (state,) = sparse_states(loop.opt_state)
    masks = sparse_optax.get_masks(loop.opt_state)
    return Snapshot(*jax.device_get((loop.params, masks, grads, state)))
