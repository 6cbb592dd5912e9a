"""Classes that a model's parts have while there are ghosts in it.

Each is a subclass of the user's own, made once, and put in its place: parameters keep
their paths, and isinstance its answers. The call of the whole model opens a `Call`.
From it ghosts read the intensity, so that it is stored once, and in it convolutions
leave their inputs for the ghosts behind their norms.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from sparsejax.recipes._call import Call, under_way
from sparsejax.recipes.ghost_activation import unless_faded
from sparsejax.recipes.ghost_neuron import neurons_of
from sparsejax.recipes.soften import soften

# Attributes that modules have while there are ghosts in them.
NAMES = frozenset({"ghost_skip", "ghost_intensity", "ghost_neurons"})


class GhostIntensity(nnx.Variable):
    """How much of the ghosts there is in a model, a float32 scalar: no parameter."""


@contextlib.contextmanager
def calling(model: nnx.Module, intensity: jax.Array) -> Iterator[Call]:
    """Open the call of a model.

    Parts that depend on it have a mark of their own while it lasts: a method that is
    compiled by itself is then traced in every call, instead of running with the
    intensity of an earlier one.
    """
    call, mark = Call(intensity), object()
    token = under_way.set(call)
    parts = modules(model).values()
    marked = [vars(part) for part in parts if is_changed(part) or neurons_of(part)]
    for attributes in marked:
        attributes["ghost_call"] = mark
    try:
        yield call
    finally:
        for attributes in marked:
            attributes.pop("ghost_call", None)
        under_way.reset(token)


def _call_of(layer: Any) -> Call:
    call = under_way.get()
    if call is None:
        raise RuntimeError(
            f"{type(layer).__name__} was called outside of the model that ghosts were "
            "added to; call that model itself."
        )
    return call


@functools.cache
def conv_class(base: type) -> type:
    """Return a convolution that keeps its input and its output in the call."""

    class GhostedConv(base):
        def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
            y = super().__call__(x, *args, **kwargs)
            _call_of(self).convolutions.append((self, x, y))
            return y

    return _named(GhostedConv, base)


@functools.cache
def watched_norm_class(base: type) -> type:
    """Return a norm that keeps its input in the call."""

    class WatchedNorm(base):
        def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
            _call_of(self).norms.append((self, x))
            return super().__call__(x, *args, **kwargs)

    return _named(WatchedNorm, base)


@functools.cache
def norm_class(base: type) -> type:
    """Return a norm that adds its ``ghost_skip``, of its convolution's input."""

    class GhostedNorm(base):
        def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
            call = _call_of(self)
            y = super().__call__(x, *args, **kwargs)
            inputs = [before for _, before, after in call.convolutions if after is x]
            if not inputs:
                raise ValueError(
                    "A norm with a ghost skip must be given the output of its "
                    "convolution, as when the ghosts were added, and got another "
                    f"array of shape {x.shape}. Add them in the mode of training."
                )
            ghost = call.intensity * self.ghost_skip(inputs[-1], *args, **kwargs)
            return unless_faded(call.intensity, y + ghost.astype(y.dtype), y)

    return _named(GhostedNorm, base)


@functools.cache
def model_class(base: type) -> type:
    """Return a model that opens a call, with its ``ghost_intensity``.

    Its ReLUs are softened where ``ghost_neurons`` is not None.
    """

    class GhostedModel(base):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            intensity = self.ghost_intensity[...]
            if self.ghost_neurons is None:
                with calling(self, intensity):
                    return base.__call__(self, *args, **kwargs)

            def call(model, *args, **kwargs):
                with calling(model, model.ghost_intensity[...]):
                    return base.__call__(model, *args, **kwargs)

            fn, state = as_function(self, call)
            ghosted = soften(fn, kind=self.ghost_neurons)
            output, changed = ghosted(intensity, state, *args, **kwargs)
            _update(self, state, changed)
            return output

    return _named(GhostedModel, base)


def _named(made: Any, base: type) -> type:
    made.__name__ = made.__qualname__ = f"Ghosted{base.__name__}"
    made.__doc__ = base.__doc__
    made.plain_class = base
    return made


def is_changed(module: Any) -> bool:
    """Tell whether a module has one of the classes above."""
    return "plain_class" in vars(type(module))


def change_class(module: Any, to: Callable[[type], type]) -> None:
    """Give a module one of the classes above, made of its own."""
    object.__setattr__(module, "__class__", to(type(module)))


def restore_class(module: Any) -> None:
    """Undo `change_class`."""
    object.__setattr__(module, "__class__", type(module).plain_class)


def modules(model: nnx.Module) -> dict[str, Any]:
    """Return a module and all modules in it by path."""
    return {"/".join(map(str, keys)): part for keys, part in nnx.iter_modules(model)}


def as_function(
    model: nnx.Module, call: Callable[..., Any]
) -> tuple[Callable[..., Any], nnx.State]:
    """Return a call of a module as a pure function, and its first argument.

    Args:
      model: the module.
      call: ``call(module, *args, **kwargs)``.

    Returns:
      ``fn(state, *args, **kwargs) -> (output, state)``, and the state of the module.
    """
    graphdef, state = nnx.split(model)

    def fn(state, *args, **kwargs):
        copy = nnx.merge(graphdef, state, copy=True)
        output = call(copy, *args, **kwargs)
        return output, nnx.state(copy)

    fn.__name__ = type(model).__name__
    return fn, state


def _update(model: nnx.Module, before: nnx.State, after: nnx.State) -> None:
    """Write what a call has changed, as statistics of norms, into the module."""
    old, new = (dict(nnx.to_flat_state(state)) for state in (before, after))
    if old.keys() != new.keys():
        names = ", ".join("/".join(map(str, path)) for path in old.keys() ^ new.keys())
        raise ValueError(
            "A model with ghost neurons must keep its variables when it is called, and "
            f"this one makes or deletes {names}. Sow nothing while there are ghosts, "
            "or add them with neurons=None and recipes.GhostNeuron as the activation."
        )

    def same(path):
        pair = jax.tree.leaves(old[path]), jax.tree.leaves(new[path])
        return list(map(id, pair[0])) == list(map(id, pair[1]))

    changed = [(path, value) for path, value in new.items() if not same(path)]
    nnx.update(model, nnx.from_flat_state(changed))
