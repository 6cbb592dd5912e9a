"""Primitives that work entry by entry: operands share their axes."""

import numpy as np
from scipy import special

from sparsejax.compaction.axes import Axis, Origin
from sparsejax.compaction.known import Known
from sparsejax.compaction.rules.registry import register

# What NumPy calls them, where it is worth knowing their values.
_NUMPY = {
    "abs": np.abs,
    "acos": np.arccos,
    "acosh": np.arccosh,
    "add": np.add,
    "add_any": np.add,
    "and": np.bitwise_and,
    "asin": np.arcsin,
    "asinh": np.arcsinh,
    "atan": np.arctan,
    "atan2": np.arctan2,
    "atanh": np.arctanh,
    "cbrt": np.cbrt,
    "ceil": np.ceil,
    "copy": np.copy,
    "copy_p": np.copy,
    "cos": np.cos,
    "cosh": np.cosh,
    "eq": np.equal,
    "erf": special.erf,
    "erf_inv": special.erfinv,
    "erfc": special.erfc,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "floor": np.floor,
    "ge": np.greater_equal,
    "gt": np.greater,
    "is_finite": np.isfinite,
    "le": np.less_equal,
    "log": np.log,
    "log1p": np.log1p,
    "logistic": special.expit,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "pow": np.power,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sign": np.sign,
    "sin": np.sin,
    "sinh": np.sinh,
    "sqrt": np.sqrt,
    "square": np.square,
    "stop_gradient": np.copy,
    "sub": np.subtract,
    "tan": np.tan,
    "tanh": np.tanh,
    "xor": np.bitwise_xor,
}
# These leave values as they are.
_SAME = (
    "layout_constraint",
    "name",
    "pvary",
    "reduce_precision",
    "reshard",
    "sharding_constraint",
)
_NUMPY.update(dict.fromkeys(_SAME, np.copy))
_OTHERS = (
    "clamp",
    "conj",
    "convert_element_type",
    "device_put",
    "digamma",
    "div",
    "imag",
    "integer_pow",
    "lgamma",
    "mul",
    "mulhi",
    "nextafter",
    "optimization_barrier",
    "population_count",
    "real",
    "rem",
    "round",
    "select_n",
    "shift_left",
    "shift_right_arithmetic",
    "shift_right_logical",
)
_STATISTICAL = {"rsqrt", "sqrt"}


def _couple(coupling, equation):
    derived = all(coupling.is_derived(value) for value in equation.inputs)
    outputs = []
    for output in equation.outputs:
        rank, axes = len(output.shape), []
        for index, size in enumerate(output.shape):
            meeting = [
                (number, value, coupling.of(value)[index])
                for number, value in enumerate(equation.inputs)
                if len(value.shape) == rank and value.shape[index] == size
            ]
            for number, value, axis in meeting:
                if coupling.is_derived(value) and not derived:
                    coupling.play("norm", _seen(axis, equation, number))
            axes.append(_joined(coupling, equation, meeting))
        outputs.append(axes)
    return outputs


def _joined(coupling, equation, meeting):
    number, _, axis = meeting[0]
    axis = _seen(axis, equation, number)
    for number, _, other in meeting[1:]:
        axis = coupling.join(axis, _seen(other, equation, number), equation)
    return axis


def _seen(axis, equation, number):
    """Mark a parameter's axis as a statistic's where it is divided by or subtracted."""
    statistic = equation.name in _STATISTICAL or (
        equation.name in ("sub", "div") and number == 1
    )
    if axis is None or not statistic:
        return axis
    marked = frozenset(Origin(o.path, o.axis, statistic=True) for o in axis.origin)
    return Axis(axis.atoms, marked)


def _evaluate(liveness, equation, ins):
    if equation.name == "optimization_barrier":
        return ins
    (output,) = equation.outputs
    shape = liveness.shape(output)
    ins = [_wide(_spread(one, shape)) for one in ins]
    unknown = np.logical_or.reduce(np.broadcast_arrays(*[one.unknown for one in ins]))
    value, unknown = _special(equation, ins, unknown)
    if value is None:
        function = _function(equation)
        if function is None or unknown.all():
            return [liveness.nothing(output)]
        value = function(*[one.value for one in ins]).astype(output.dtype, copy=False)
    return [
        Known(np.broadcast_to(value, shape), np.broadcast_to(unknown, shape)),
    ]


def _spread(one, shape):
    """Collapse the axes that are fixed in the result; scalars stay as they are."""
    if one.value.ndim != len(shape):
        return one
    fixed = tuple(i for i, n in enumerate(shape) if n == 1)
    return one.collapse(fixed)


def _wide(one):
    """Compute with float32 where NumPy or SciPy know no functions of half precision."""
    small = one.value.dtype.itemsize == 2 and one.value.dtype.kind not in "iub"
    return Known(one.value.astype(np.float32), one.unknown) if small else one


def _special(equation, ins, unknown):
    """Return the value, or None, and where it is unknown, for what zeros decide."""
    if equation.name == "mul":
        zero = ~ins[0].may | ~ins[1].may
        value = np.where(zero, 0, ins[0].clean * ins[1].clean)
        return value.astype(equation.outputs[0].dtype, copy=False), unknown & ~zero
    if equation.name == "div":
        zero = np.broadcast_to(~ins[0].may, unknown.shape) & ins[1].may
        value = np.where(zero, 0, ins[0].value / ins[1].value)
        return value.astype(equation.outputs[0].dtype, copy=False), unknown & ~zero
    if equation.name == "select_n":
        cases = ins[1:]
        same = ~np.logical_or.reduce(
            [(one.value != cases[0].value) | one.unknown for one in cases]
        )
        value = np.choose(ins[0].clean.astype(int), [one.value for one in cases])
        return np.where(same, cases[0].value, value), unknown & ~same
    return None, unknown


def _function(equation):
    name, params = equation.name, equation.params
    if name == "convert_element_type":
        return lambda x: x.astype(params["new_dtype"])
    if name == "integer_pow":
        return lambda x: x ** x.dtype.type(params["y"])
    if name == "round":
        to_even = params["rounding_method"] == 1
        away = lambda x: np.copysign(np.floor(np.abs(x) + x.dtype.type(0.5)), x)
        return np.rint if to_even else away
    if name == "clamp":
        return lambda low, x, high: np.clip(x, low, high)
    return _NUMPY.get(name)


register(*_NUMPY, *_OTHERS, couple=_couple, evaluate=_evaluate)
