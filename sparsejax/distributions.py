"""How many weights each layer keeps: uniform and Erdős–Rényi–kernel.

A distribution is a function ``(shapes, sparsity) -> kept``: from a dict of layer
shapes, ``(neurons, inputs, *spatial)``, and the sparsity of all layers together to a
dict of integers. Counts are taken in rational arithmetic, where 1 - 0.9 is 1/10.
"""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

Shapes = Mapping[str, tuple[int, ...]]
Distribution = Callable[[Shapes, float], Mapping[str, int]]


def uniform(shapes: Shapes, sparsity: float) -> dict[str, int]:
    """Give every layer the same sparsity.

    Args:
      shapes: shape of each layer by path.
      sparsity: fraction of weights that are zero, in [0, 1).

    Returns:
      Number of active weights by path: all but ``floor(sparsity * size)``.

    Raises:
      ValueError: ``sparsity`` is outside [0, 1).

    Example:
      >>> from sparsejax import distributions
      >>> distributions.uniform({"a": (10, 10), "b": (3, 5)}, 0.9)
      {'a': 10, 'b': 2}
    """
    s = rational(sparsity)
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    return {path: n - math.floor(s * n) for path, n in sizes.items()}


def erk(shapes: Shapes, sparsity: float, *, power: float = 1.0) -> dict[str, int]:
    """Give each layer a density proportional to ``sum(shape) / prod(shape)``.

    Layers that would need more than all their weights are dense, and the others make
    up for them: Evci et al. 2020, "Rigging the lottery", section 3 (1), with the
    accounting of its released code.

    Args:
      shapes: shape of each layer by path, ``(neurons, inputs, *spatial)``.
      sparsity: fraction of all weights together that are zero, in [0, 1).
      power: exponent of the ratio, the code's ``erk_power_scale``; 0 is uniform among
        the layers that are not dense.

    Returns:
      Number of active weights by path.

    Raises:
      ValueError: ``sparsity`` is outside [0, 1).

    Example:
      >>> from sparsejax import distributions
      >>> distributions.erk({"conv": (8, 3, 3, 3), "fc": (10, 512)}, 0.9)
      {'conv': 17, 'fc': 518}
    """
    s = rational(sparsity)
    size = {path: math.prod(shape) for path, shape in shapes.items()}
    zeros = {path: math.floor(s * n) for path, n in size.items()}
    ratio = {path: Fraction(sum(shape), size[path]) for path, shape in shapes.items()}
    if power != 1:
        ratio = {path: Fraction(float(r) ** power) for path, r in ratio.items()}
    sparse = set(shapes)
    while sparse:
        kept = sum(size[p] - zeros[p] for p in sparse)
        budget = kept - sum(zeros[p] for p in shapes if p not in sparse)
        scale = budget / sum(ratio[p] * size[p] for p in sparse)
        largest = max(ratio[p] for p in sparse)
        if scale * largest <= 1:
            break
        sparse -= {p for p in sparse if ratio[p] == largest}
    density = {p: scale * ratio[p] if p in sparse else Fraction(1) for p in shapes}
    return {p: n - math.floor((1 - density[p]) * n) for p, n in size.items()}


def rational(sparsity: float) -> Fraction:
    """Return a sparsity as the fraction that its decimals mean.

    Raises:
      ValueError: it is not a number in [0, 1).
    """
    try:
        valid = 0 <= sparsity < 1
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(
            f"sparsity is the fraction of weights that are zero and must lie in "
            f"[0, 1), got {sparsity!r}."
        )
    return Fraction(repr(float(sparsity)))
