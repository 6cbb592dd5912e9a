"""What is known of a value before its input is: NumPy arrays, one entry a channel.

Axes that are no channels are collapsed to size one: an entry is known only where all
that it stands for is equal. That keeps the arrays small, and a whole network takes
fractions of a second.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """A value seen by channel.

    Attributes:
      value: array, the size of an axis of channels or 1 for every axis.
      unknown: bool array of that shape, ``True`` where the value is not known.
    """

    value: np.ndarray
    unknown: np.ndarray

    def __iter__(self) -> Iterator[np.ndarray]:
        yield self.value
        yield self.unknown

    @functools.cached_property
    def certain(self) -> bool:
        """Whether all of it is known."""
        return not self.unknown.any()

    @functools.cached_property
    def may(self) -> np.ndarray:
        """Bool array: where the value may be other than zero."""
        nonzero = self.value != 0
        return nonzero if self.certain else self.unknown | nonzero

    @property
    def clean(self) -> np.ndarray:
        """The value, zero where it is unknown."""
        if self.certain:
            return self.value
        return np.where(self.unknown, np.zeros((), self.value.dtype), self.value)

    def collapse(self, axes: tuple[int, ...]) -> "Known":
        """Return what is known of all indices of some axes at once."""
        axes = tuple(axis for axis in axes if self.value.shape[axis] != 1)
        if not axes:
            return self
        first = tuple(
            slice(0, 1) if axis in axes else slice(None)
            for axis in range(self.value.ndim)
        )
        differs = (self.value != self.value[first]) | self.unknown
        return Known(self.value[first], differs.any(axis=axes, keepdims=True))


def either(a: Known, b: Known) -> Known:
    """Return what is known of a value that is one or the other."""
    return Known(a.value, a.unknown | b.unknown | (a.value != b.value))


def certain(value: np.ndarray) -> Known:
    """Return a known array."""
    return Known(value, np.broadcast_to(False, value.shape))


def unknown(shape: tuple[int, ...], dtype: np.dtype) -> Known:
    """Return an array of which nothing is known."""
    return Known(np.zeros(shape, dtype), np.ones(shape, bool))
