"""Which BatchNorm follows which convolution: seen in an abstract call of the model."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.recipes import _ghosted
from sparsejax.recipes._call import Call
from sparsejax.recipes._relus import trace
from sparsejax.recipes.ghost_skip import strides_of

Where = Callable[[str, nnx.Conv], bool] | None


class Pairs(NamedTuple):
    """What the convolutions of a model are followed by.

    Attributes:
      norms: path of the norm behind a convolution that is to have a ghost, by the path
        of the convolution, in the order in which they run.
      passed_over: why a convolution is to have none, by its path.
    """

    norms: dict[str, str]
    passed_over: dict[str, str]


def find(model: nnx.Module, inputs: tuple[Any, ...], where: Where) -> Pairs:
    """Call a model abstractly and choose convolutions; arguments as in `add_ghosts`."""
    watched = nnx.clone(model)
    changed = {
        nnx.Conv: _ghosted.conv_class,
        nnx.BatchNorm: _ghosted.watched_norm_class,
    }
    for path, layer in _ghosted.modules(watched).items():
        for known, to in changed.items():
            if isinstance(layer, known):
                _ghosted.change_class(layer, to)
                layer.watched_path = path  # static: the copies that are called have it
    calls: list[Call] = []

    def call_once(copy, *inputs):
        with _ghosted.calling(copy, jnp.zeros(())) as call:
            calls.append(call)
            return copy(*inputs)

    fn, state = _ghosted.as_function(watched, call_once)
    trace(fn, (state, *inputs), {})
    return _choose(_ghosted.modules(model), calls[0], where)


def _choose(modules: Mapping[str, Any], call: Call, where: Where) -> Pairs:
    made_by = lambda x: next(
        (conv.watched_path for conv, _, y in call.convolutions if y is x), None
    )
    read = {(made_by(x), norm.watched_path) for norm, x in call.norms}
    shapes = {conv.watched_path: (x, y) for conv, x, y in call.convolutions}
    pairs = Pairs({}, {})
    for path, (x, y) in shapes.items():
        norms = [norm for conv, norm in read if conv == path]
        conv = modules[path]
        if where is not None and not where(path, conv):
            reason = "where= leaves it out"
        elif where is None and math.prod(conv.kernel_size) == 1:
            reason = "it is 1x1"
        elif where is None and _is_stem(path, list(shapes)):
            reason = "it is the stem"
        elif not norms:
            reason = "no BatchNorm reads its output"
        elif len(norms) > 1:
            reason = f"several norms read its output, {', '.join(norms)}"
        elif sum(norm == norms[0] for _, norm in read) > 1:
            reason = f"{norms[0]} reads other arrays as well"
        elif not _is_strided(conv, x, y):
            reason = f"{x.shape} to {y.shape} is more than strides"
        else:
            pairs.norms[path] = norms[0]
            continue
        pairs.passed_over[path] = reason
    return pairs


def _is_stem(path: str, paths: list[str]) -> bool:
    """Tell whether it runs first, and is no first of many in a list, as in a VGG."""
    anywhere = lambda path: re.sub(r"(?<![^/])\d+(?![^/])", "*", path)
    alike = [other for other in paths if anywhere(other) == anywhere(path)]
    return path == paths[0] and alike == [path]


def _is_strided(conv: nnx.Conv, x: jax.Array, y: jax.Array) -> bool:
    """Tell whether the output is as large as that of a 1x1 of the same strides."""
    strides = strides_of(conv)
    before, after = (a.shape[-1 - len(strides) : -1] for a in (x, y))
    return after == tuple(-(-n // s) for n, s in zip(before, strides, strict=True))
