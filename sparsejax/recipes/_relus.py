"""The ReLUs of a jaxpr: where they are, and the same program with others in place.

`trace` makes the jaxpr of a call. `find` looks in it for `jax.nn.relu`, `jax.nn.relu6`
and ``max(x, 0)`` with a literal zero or zeros made of one, through calls, checkpoints,
scans, loops and branches. `run` then runs it, with what it is given in place of each;
what holds none of them runs as it is, calls and derivatives included.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from sparsejax._calls import CALLS, opened, source_line

_RELUS = ("relu", "relu6")
_KEEP_ZEROS = ("broadcast_in_dim", "convert_element_type", "pvary", "reshard")
# Made of ReLU6 and no activation of the network itself: a gate.
_GATES = ("hard_sigmoid",)
_BODIES: dict[str, tuple[str, ...]] = {
    **{name: (held,) for name, held in CALLS.items() if "custom" not in name},
    "scan": ("jaxpr",),
    "while": ("cond_jaxpr", "body_jaxpr"),
    "cond": ("branches",),
}


class Site(NamedTuple):
    """An equation that is a ReLU, or holds some.

    Attributes:
      name: "relu", "relu6" or "max"; None where it only holds some.
      line: of the source, or "".
      bodies: the sites of each jaxpr that it holds; none in a ReLU.
      operand: the number of the input that is not the zero of ``max(x, 0)``.
    """

    name: str | None
    line: str
    bodies: tuple[Mapping[int, "Site"], ...] = ()
    operand: int = 0


Sites = Mapping[int, Site]


def trace(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[ClosedJaxpr, list[Any], Any]:
    """Return the jaxpr of a call, the arrays that it takes, and its output's tree.

    Leaves of the arguments that are no arrays are part of the program.
    """
    leaves, treedef = jax.tree.flatten((args, dict(kwargs)))
    known = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, known)}

    def of_arrays(arrays):
        args, kwargs = treedef.unflatten((dict(enumerate(leaves)) | arrays).values())
        return fn(*args, **kwargs)

    program, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(arrays)
    return program, list(arrays.values()), jax.tree.structure(shapes)


def find(
    program: ClosedJaxpr | Jaxpr,
    zeros: Sequence[bool] = (),
    carries: Sequence[bool] | None = None,
    caller: str = "",
) -> Sites:
    """Return the sites of a jaxpr by the number of their equation.

    Args:
      program: the jaxpr.
      zeros: which of its inputs are known to be 0; none by default.
      carries: which of its inputs carry what the network is given, parameters
        included; by default all but random keys. A maximum of anything else, as of
        the random numbers of a dropout, is no activation.
      caller: the line that is named for what JAX's own functions do.
    """
    jaxpr, _ = opened(program)
    carries = [_is_data(v) for v in jaxpr.invars] if carries is None else carries
    carrying = {v for v, own in zip(jaxpr.invars, carries, strict=True) if own}
    carrying.update(filter(_is_data, jaxpr.constvars))
    known_zeros = {v for v, zero in zip(jaxpr.invars, zeros, strict=False) if zero}
    made_by = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    literal = lambda atom: isinstance(atom, Literal)
    is_zero = lambda atom: (
        bool(np.all(atom.val == 0)) if literal(atom) else atom in known_zeros
    )
    sites = {}
    for number, eqn in enumerate(jaxpr.eqns):
        name, zeros = eqn.primitive.name, [is_zero(atom) for atom in eqn.invars]
        carries = [not literal(atom) and atom in carrying for atom in eqn.invars]
        if name in _KEEP_ZEROS and all(zeros):
            known_zeros.update(eqn.outvars)
        if not any(carries):
            continue
        carrying.update(eqn.outvars)
        line = source_line(eqn) or caller
        if relu := _jax_relu(eqn):
            sites[number] = Site(relu, line)
        elif name == "max" and any(zeros):
            x: Any = eqn.invars[carries.index(True)]
            floating = jnp.issubdtype(x.aval.dtype, jnp.floating)
            if floating and not _is_variance(x, made_by):
                sites[number] = Site("max", line, operand=carries.index(True))
        elif name in _BODIES and eqn.params.get("name") not in _GATES:
            flags = (zeros, carries) if name in CALLS else ((), None)
            bodies = tuple(find(body, *flags, line) for body in _bodies(eqn))
            if any(bodies):
                sites[number] = Site(None, line, bodies)
    return sites


def listed(sites: Sites) -> Iterator[str]:
    """Say of each ReLU what it is and where, in the order in which they run."""
    for site in sites.values():
        if site.name:
            yield f"{site.name} ({site.line})" if site.line else site.name
        else:
            for body in site.bodies:
                yield from listed(body)


def run(
    program: ClosedJaxpr | Jaxpr,
    inputs: Sequence[Any],
    sites: Sites,
    bend: Callable[[jax.Array], jax.Array],
    choose: Callable[[Any, Any], Any],
) -> list[Any]:
    """Run a jaxpr with other activations.

    Args:
      program: the jaxpr.
      inputs: its arguments. An output that is an argument is the same object.
      sites: what `find` returned for it.
      bend: what takes the place of ``max(x, 0)``.
      choose: ``choose(bent, plain)``, of a ReLU's two results.
    """
    jaxpr, consts = opened(program)
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else values[atom]
    inside = functools.partial(run, bend=bend, choose=choose)
    for number, eqn in enumerate(jaxpr.eqns):
        operands = [read(atom) for atom in eqn.invars]
        with eqn.ctx.manager:
            site = sites.get(number)
            if site is None:
                results = _bind(eqn, operands)
            elif site.name:
                bent = bend(operands[site.operand])
                bent = jnp.minimum(bent, 6.0) if site.name == "relu6" else bent
                results = [choose(bent, *_bind(eqn, operands))]
            else:
                bodies = [
                    functools.partial(lambda body, own, *x: inside(body, x, own), *pair)
                    for pair in zip(_bodies(eqn), site.bodies, strict=True)
                ]
                results = _rebuilt(eqn, bodies, operands)
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _rebuilt(
    eqn: JaxprEqn, bodies: Sequence[Callable[..., list[Any]]], operands: list[Any]
) -> Sequence[Any]:
    """Run an equation with other bodies."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        first, end = params["num_consts"], params["num_consts"] + params["num_carry"]

        def step(carry, xs):
            results = bodies[0](*operands[:first], *carry, *xs)
            return results[: end - first], results[end - first :]

        options = {key: params[key] for key in ("length", "reverse", "unroll")}
        carry, ys = lax.scan(step, operands[first:end], operands[end:], **options)
        return [*carry, *ys]
    if name == "while":
        of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
        consts, start = operands[: of_cond + of_body], operands[of_cond + of_body :]
        return lax.while_loop(
            lambda carry: bodies[0](*consts[:of_cond], *carry)[0],
            lambda carry: bodies[1](*consts[of_cond:], *carry),
            start,
        )
    if name == "cond":
        return lax.switch(operands[0], bodies, *operands[1:])
    if name == "remat2":
        options = {key: params[key] for key in ("policy", "prevent_cse")}
        return jax.checkpoint(bodies[0], **options)(*operands)
    return bodies[0](*operands)


def _bind(eqn: JaxprEqn, operands: list[Any]) -> Sequence[Any]:
    results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return results if eqn.primitive.multiple_results else [results]


def _jax_relu(eqn: JaxprEqn) -> str | None:
    """Return which of JAX's functions it is: each is compiled, with a derivative."""
    if eqn.primitive.name != "custom_jvp_call":
        return None
    inner = opened(eqn.params["call_jaxpr"])[0].eqns
    name = inner[0].params.get("name") if len(inner) == 1 else None
    return name if name in _RELUS else None


def _is_data(var: Any) -> bool:
    """Tell whether it is anything but a random key, typed or not."""
    key = jnp.issubdtype(var.aval.dtype, jax.dtypes.prng_key)
    return not key and var.aval.dtype != jnp.uint32


def _is_variance(atom: Any, made_by: Mapping[Any, JaxprEqn]) -> bool:
    """Tell whether it is a mean of squares less the square of a mean.

    Norms keep that from rounding to less than 0, by the same ``max(x, 0)``.
    """
    maker = lambda x: None if isinstance(x, Literal) else made_by.get(x)
    difference = maker(atom)
    if difference is None or difference.primitive.name != "sub":
        return False
    squared = maker(difference.invars[1])
    if squared is None:
        return False
    name, operands = squared.primitive.name, squared.invars
    power = name == "integer_pow" and squared.params["y"] == 2
    return name == "square" or power or (name == "mul" and operands[0] is operands[1])


def _bodies(eqn: JaxprEqn) -> tuple[Any, ...]:
    held = [eqn.params[key] for key in _BODIES[eqn.primitive.name]]
    return held[0] if isinstance(held[0], tuple) else tuple(held)
