"""Put ghosts into a model of Flax NNX as it is, and set how much of them there is."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import chex
import jax.numpy as jnp
from flax import nnx

from sparsejax.recipes import _ghosted, _pairs
from sparsejax.recipes._ghosted import GhostIntensity
from sparsejax.recipes.ghost_activation import Kind, check_intensity, check_kind
from sparsejax.recipes.ghost_neuron import neurons_of
from sparsejax.recipes.ghost_skip import GhostSkip
from sparsejax.recipes.soften import relus

M = TypeVar("M", bound=nnx.Module)


class GhostReport(NamedTuple):
    """What ghosts a model was given.

    Attributes:
      neurons: the ReLUs that were replaced, in the order in which they run.
      skips: path of the norm that adds a ghost, by the path of its convolution.
      passed_over: why a convolution has no ghost, by its path.
    """

    neurons: tuple[str, ...]
    skips: dict[str, str]
    passed_over: dict[str, str]

    def __str__(self) -> str:
        """List them, a line each."""
        lines = [f"neuron: {relu}" for relu in self.neurons]
        lines += [f"skip: beside {conv}, into {n}" for conv, n in self.skips.items()]
        return "\n".join(lines) + _lines(self.passed_over)


def add_ghosts(
    model: M,
    *inputs: Any,
    neurons: Kind | None = "swish",
    skips: bool = True,
    where: Callable[[str, nnx.Conv], bool] | None = None,
) -> tuple[M, GhostReport]:
    """Return a copy of a model with ghost neurons and ghost skips.

    Every ReLU that `soften` finds becomes a ghost activation. Beside convolutions
    stand ghost skips: the output of the norm behind a convolution is
    ``norm(conv(x)) + intensity * ghost(x)``. All share one intensity, 1 at first; set
    it at every step by `set_intensity`. At 0 outputs, statistics and gradients are
    those of the plain model and gradients of the ghosts are 0: bit for bit, but for
    roundings where two programs are compiled differently. `remove_ghosts` takes them
    out again.

    The parameters keep their paths, so that masks, optimizer states and checkpoints of
    the plain model fit; those of the ghosts are new, with "ghost_skip" in their path,
    and always dense. The intensity is a `GhostIntensity` and no ``nnx.Param``.

    It is the paper's intent that ghosts help early and then leave. When and how fast
    is this project's: the authors' code has no schedule and keeps them to the end.

    Args:
      model: in the mode of training. It stays as it is, and shares its arrays with
        the copy. Modules keep their classes as base classes.
      *inputs: example inputs of a call, arrays or `jax.ShapeDtypeStruct`; no values
        count. Leaves that are no arrays are passed on as they are.
      neurons: "swish" or "mish", as in `ghost_activation`; None: no ReLU changes.
      skips: whether there are ghost skips.
      where: ``where(path, conv)`` says beside which convolutions. By default beside
        all that are larger than 1x1, depthwise ones included, but not beside the stem:
        the first one, unless there are others like it in a list. In any case one
        BatchNorm must read the output, which must be as large as that of a 1x1.

    Returns:
      The copy, and what was found. Call the copy as a whole, in a compiled step: parts
      of it that have ghosts cannot be called alone, and methods that are compiled by
      themselves are compiled in every call.

    Raises:
      ValueError: there are ghosts already, or nothing is asked for; there is no ReLU
        where neurons are, or no convolution with a BatchNorm where skips are, and
        what was seen; there is no such kind.
      TypeError: it is no NNX module that can be called. Models of Linen get ghost
        neurons by `soften`, and no skips.

    References:
      Jaiswal et al. 2022, "Training your sparse neural network better with any mask",
      section 3.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from sparsejax import models, recipes
      >>> model = models.resnet_cifar(8, width=4, rngs=nnx.Rngs(0))
      >>> images = jnp.ones((2, 8, 8, 3))
      >>> ghosted, report = recipes.add_ghosts(model, images)
      >>> len(report.neurons), len(report.skips), report.passed_over["stem/conv"]
      (7, 6, 'it is the stem')
      >>> recipes.set_intensity(ghosted, 0.0)
      >>> ghosted.eval()
      >>> model.eval()
      >>> bool((ghosted(images) == model(images)).all())
      True
    """
    if not isinstance(model, nnx.Module) or not callable(model):
        raise TypeError(
            "add_ghosts(model) must be an nnx.Module with a __call__, got "
            f"{type(model).__name__}. Functions and model.apply of Linen get ghost "
            "neurons by recipes.soften, and no skips."
        )
    if neurons is not None:
        check_kind("add_ghosts(neurons=...)", neurons)
    modules = _ghosted.modules(model)
    if any(map(_ghosted.is_changed, modules.values())):
        raise ValueError(
            "add_ghosts(model): there are ghosts in the model already; take them out "
            "by recipes.remove_ghosts."
        )
    given = sum(len(neurons_of(part)) for part in modules.values())
    if neurons is None and not skips and not given:
        raise ValueError(
            "add_ghosts(neurons=None, skips=False) asks for no ghosts, and the model "
            "has no recipes.GhostNeuron."
        )
    found = _found_relus(model, inputs) if neurons is not None else ()
    pairs = _pairs.find(model, inputs, where) if skips else _pairs.Pairs({}, {})
    if skips and not pairs.norms:
        raise ValueError(
            "add_ghosts(skips=True) needs a convolution whose output a BatchNorm "
            f"reads, and {type(model).__name__} has none that can have a ghost:"
            f"{_lines(pairs.passed_over) or ' it calls no nnx.Conv'}. Use where= to "
            "choose others, or skips=False."
        )
    ghosted: Any = nnx.clone(model)
    modules = _ghosted.modules(ghosted)
    for conv, norm in pairs.norms.items():
        modules[norm].ghost_skip = GhostSkip(modules[conv], modules[norm])
        _ghosted.change_class(modules[norm], _ghosted.norm_class)
        _ghosted.change_class(modules[conv], _ghosted.conv_class)
    ghosted.ghost_intensity = GhostIntensity(jnp.ones((), jnp.float32))
    ghosted.ghost_neurons = neurons
    _ghosted.change_class(ghosted, _ghosted.model_class)
    return ghosted, GhostReport(found, pairs.norms, pairs.passed_over)


def set_intensity(model: nnx.Module, intensity: chex.Numeric) -> None:
    """Set how much of its ghosts there is in a model, in place.

    Args:
      model: what `add_ghosts` returned.
      intensity: scalar, 0 or above, traced or not, as
        ``schedules.linear_fade(...)(step)``; within a compiled step nothing is compiled
        again when it changes.

    Raises:
      ValueError: there are no ghosts in the model, or it is a negative number or no
        scalar.
    """
    check_intensity("set_intensity(intensity=...)", intensity)
    if not isinstance(getattr(model, "ghost_intensity", None), GhostIntensity):
        raise ValueError(
            f"set_intensity(model): this {type(model).__name__} has no ghosts; pass "
            "the model that recipes.add_ghosts returned, as a whole."
        )
    own: Any = model
    own.ghost_intensity[...] = jnp.asarray(intensity, jnp.float32)


def _found_relus(model: nnx.Module, inputs: tuple[Any, ...]) -> tuple[str, ...]:
    fn, state = _ghosted.as_function(model, lambda copy, *inputs: copy(*inputs))
    return relus(fn, state, *inputs)


def _lines(passed_over: Mapping[str, str]) -> str:
    return "".join(f"\n  {path}: {reason}" for path, reason in passed_over.items())
