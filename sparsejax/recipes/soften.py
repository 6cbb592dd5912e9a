"""Ghost neurons in a network as it is: every ReLU of a function, found by tracing."""

import functools
from collections.abc import Callable
from typing import Any

import chex

from sparsejax.recipes import _relus
from sparsejax.recipes.ghost_activation import (
    Kind,
    check_intensity,
    check_kind,
    soft,
    unless_faded,
)


def soften(fn: Callable[..., Any], *, kind: Kind = "swish") -> Callable[..., Any]:
    """Return ``fn`` with every ReLU replaced by a ghost activation.

    It is for bare functions, for ``model.apply`` of Linen, and for modules that are
    functions, as Equinox's; `add_ghosts` is for modules of Flax NNX. The function is
    traced whenever it is called, so call it under `jax.jit`. All of JAX's
    transformations work on it.

    ReLUs are `jax.nn.relu`, `jax.nn.relu6` (its bound stays) and the maximum of an
    array and a zero that is written into the program, also within jit, checkpoints,
    scans, loops and branches. Functions with derivatives of their own are left as they
    are, and so are the variance of a norm and ``jax.nn.hard_sigmoid``. `relus` lists
    what is replaced.

    Args:
      fn: the network, without its loss, which may have a maximum of its own.
      kind: "swish" or "mish", as in `ghost_activation`.

    Returns:
      ``ghosted(intensity, *args, **kwargs)``. Leaves of the arguments that are no
      arrays are passed on as they are. At intensity 0 values and derivatives are those
      of ``fn``, bit for bit but for roundings where two programs are compiled
      differently.

    Raises:
      ValueError: there is no such kind; when called, there is no ReLU.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import recipes
      >>> network = lambda w, x: jax.nn.relu(x @ w).sum()
      >>> ghosted = jax.jit(recipes.soften(network))
      >>> w, x = jnp.eye(2), jnp.array([-1.0, 1.0])
      >>> [round(float(ghosted(intensity, w, x)), 4) for intensity in (1.0, 0.5, 0.0)]
      [0.4621, 0.7616, 1.0]
    """
    check_kind("soften(kind=...)", kind)

    @functools.wraps(fn)
    def ghosted(intensity: chex.Numeric, *args: Any, **kwargs: Any) -> Any:
        check_intensity("soften: the intensity", intensity)
        program, arrays, sites, treedef = _find(fn, args, kwargs)
        bend = lambda x: soft(x, intensity, kind)
        choose = lambda bent, plain: unless_faded(intensity, bent, plain)
        return treedef.unflatten(_relus.run(program, arrays, sites, bend, choose))

    return ghosted


def relus(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, ...]:
    """List the ReLUs of ``fn(*args, **kwargs)`` that `soften` replaces.

    Args:
      fn: as in `soften`.
      *args: as ``fn`` takes them; arrays may be `jax.ShapeDtypeStruct`.
      **kwargs: likewise.

    Returns:
      A line for each, in the order in which they run: what it is, and where in the
      source.

    Raises:
      ValueError: there is none.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import recipes
      >>> recipes.relus(lambda x: jax.nn.relu(x) + jnp.maximum(x, 0), jnp.ones(3))
      ('relu (...)', 'max (...)')
    """
    _, _, sites, _ = _find(fn, args, kwargs)
    return tuple(_relus.listed(sites))


def _find(fn, args, kwargs):
    """Return the program of a call, what it takes, its ReLUs and its output's tree."""
    program, arrays, treedef = _relus.trace(fn, args, kwargs)
    sites = _relus.find(program)
    if not sites:
        name = getattr(fn, "__name__", type(fn).__name__)
        raise ValueError(
            f"Ghost neurons take the place of ReLUs, and {name} has none: neither "
            "jax.nn.relu nor relu6, nor a maximum with a literal 0. Functions with "
            "derivatives of their own are not searched. Write the activation as "
            "jax.nn.relu, or call recipes.ghost_activation in its place."
        )
    return program, arrays, sites, treedef
