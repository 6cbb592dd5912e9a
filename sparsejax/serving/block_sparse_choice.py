"""Which form of a layer is the best: measured on the device, on its real shapes.

No formula tells it: gathering, and how well a device multiplies narrow matrices, decide
as much as the number of multiply-adds. A measurement is data, to be stored and used
again, so that the choice is the same ever after.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax.serving.block_sparse import (
    FORMS,
    Padding,
    block_sparse_conv,
    block_sparse_linear,
    window,
)
from sparsejax.serving.block_sparse_index import Blocks

DENSE = ("dense", "unfolded")  # the forms that take all of the kernel
_WORTH = 0.9


class Measured(NamedTuple):
    """How long the forms of a layer take.

    ``Measured(**json.loads(json.dumps(measured._asdict())))`` restores one.

    Attributes:
      what: the device, the blocks, the input and the options that it holds for.
      seconds: by form, the median of a call. "dense" is XLA's own convolution or
        product with the masked kernel; "unfolded" is a convolution with the masked
        kernel as one product with the unfolded images; the others are those of
        `block_sparse_conv`.
    """

    what: str
    seconds: Mapping[str, float]

    @property
    def best(self) -> str:
        """The fastest form if it takes less than 0.9 of the dense layer, else "dense".

        A layer measured alone does not show what another form costs its neighbours,
        which XLA fuses with the dense one.
        """
        form = min(self.seconds, key=self.seconds.__getitem__)
        gains = self.seconds[form] < _WORTH * self.seconds["dense"]
        return form if gains else "dense"


def measure_forms(
    blocks: Blocks,
    input_shape: Sequence[int],
    dtype: Any = jnp.float32,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    seconds: float = 0.5,
) -> Measured:
    """Time all forms of a layer on the default device, one after another in turn.

    Weights and inputs are random; only the shapes and the blocks matter.

    Args:
      blocks: of the kernel.
      input_shape: [batch, h, w, in] for a convolution, [..., in] for a linear layer.
      dtype: of weights and inputs.
      strides: of a convolution, as in `block_sparse_conv`.
      padding: of a convolution, as in `block_sparse_conv`.
      seconds: after which no round begins; there are five at least.

    Returns:
      A `Measured`.

    Raises:
      ValueError: as `block_sparse_conv` and `block_sparse_linear`.

    Example:
      >>> import numpy as np
      >>> from sparsejax import serving
      >>> blocks = serving.Blocks((6, 4), [(np.array([0, 3]), np.array([1, 4, 5]))])
      >>> measured = serving.measure_forms(blocks, (8, 6), seconds=0.01)
      >>> list(measured.seconds)
      ['dense', 'gathered', 'padded']
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=input_shape), dtype)
    kernel = jnp.asarray(rng.normal(size=blocks.shape) * blocks.mask, dtype)
    calls = compiled(blocks, x, kernel, strides=strides, padding=padding)
    what = describe(blocks, input_shape, dtype, strides=strides, padding=padding)
    times = times_in_turn(calls, seconds)
    medians = {form: float(np.median(values)) for form, values in times.items()}
    return Measured(what, medians)


def describe(
    blocks: Blocks,
    input_shape: Sequence[int],
    dtype: Any = jnp.float32,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
) -> str:
    """Return what a measurement with these arguments holds for, device included."""
    device = jax.devices()[0].device_kind
    shape = ", ".join(map(str, input_shape))
    text = f"{device}: {blocks} on {jnp.dtype(dtype).name}[{shape}]"
    if len(blocks.shape) == 4:
        steps, pads = window(input_shape[1:3], blocks.shape[:2], strides, padding)
        text += f", strides {steps}, padding {pads}"
    return text


def compiled(
    blocks: Blocks,
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
) -> dict[str, Callable[[], jax.Array]]:
    """Compile a layer in each form; of a kernel that is one block, the dense forms.

    Args:
      blocks: of the kernel.
      x: the input.
      kernel: masked.
      strides: of a convolution, as in `block_sparse_conv`.
      padding: of a convolution, as in `block_sparse_conv`.

    Returns:
      By form, a function without arguments that computes the layer.
    """
    calls = {}

    def add(form: str, function: Callable[..., jax.Array], weights: Any) -> None:
        run = jax.jit(function).lower(x, weights).compile()
        calls[form] = functools.partial(run, x, weights)

    if len(blocks.shape) == 2:
        add("dense", jnp.matmul, kernel)
        run, forms = block_sparse_linear, ("gathered", "padded")
    else:
        options = {"strides": strides, "padding": padding}
        add("dense", functools.partial(_dense_conv, **options), kernel)
        run, forms = functools.partial(block_sparse_conv, **options), FORMS
        full = Blocks.full(blocks.shape)
        unfolded = functools.partial(run, blocks=full, form="gathered")
        add("unfolded", unfolded, full.split(kernel))
    for form in forms if blocks.density < 1 else ():
        function = functools.partial(run, blocks=blocks, form=form)
        add(form, function, blocks.split(kernel))
    return calls


def _dense_conv(x, kernel, *, strides, padding):
    steps, pads = window(x.shape[1:3], kernel.shape[:2], strides, padding)
    return lax.conv_general_dilated(
        x, kernel, steps, pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def times_in_turn(
    calls: Mapping[str, Callable[[], Any]], seconds: float
) -> dict[str, np.ndarray]:
    """Call functions in turn, round after round, and time them.

    A call that is not timed goes before each that is, so that caches and memory are as
    the function itself leaves them, and not the one before it. What takes more than
    three times as long as the dense layer in the first round is not called again.

    Args:
      calls: functions without arguments by the name of the form.
      seconds: after which no round begins; there are five at least.

    Returns:
      Seconds of every call by name, [rounds].
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    jax.block_until_ready([call() for call in calls.values()])
    left, end = list(calls), time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:
        for name in left:
            jax.block_until_ready(calls[name]())
            begin = time.perf_counter()
            jax.block_until_ready(calls[name]())
            times[name].append(time.perf_counter() - begin)
        if not rounds:
            longest = 3 * min(times[name][0] for name in DENSE if name in calls)
            left = [name for name in calls if times[name][0] <= longest]
        rounds += 1
    return {name: np.array(values) for name, values in times.items()}
