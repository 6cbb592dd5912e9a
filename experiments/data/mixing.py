"""Mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019) of neighbours in a batch.

Examples 2j and 2j+1 of a batch are a pair, and each gets a part of the other. A pair is
drawn for its place in the batch of all processes, and lies on one of them: the result
does not depend on how many share the batch.
"""

from typing import NamedTuple

import numpy as np


class Pairs(NamedTuple):
    """What is drawn for pairs, each array [pairs].

    Attributes:
      cut: True for cutmix, False for mixup.
      share: how much an example keeps of itself, in [0, 1].
      y: the middle of the box that cutmix swaps, in [0, 1) of the height.
      x: the same for the width.
    """

    cut: np.ndarray
    share: np.ndarray
    y: np.ndarray
    x: np.ndarray

    def part(self, index: int, count: int) -> "Pairs":
        """Return the pairs of one of `count` processes."""
        return Pairs(*(np.split(array, count)[index] for array in self))


def draw(rng: np.random.Generator, pairs: int, mixup: float, cutmix: float) -> Pairs:
    """Draw shares from Beta(alpha, alpha); each pair takes mixup or cutmix by chance.

    Args:
      rng: of this batch.
      pairs: how many.
      mixup: its alpha; 0: cutmix alone.
      cutmix: its alpha; 0: mixup alone.
    """
    cut = rng.random(pairs) < (0.5 if mixup and cutmix else float(cutmix > 0))
    share = rng.beta(*[np.where(cut, cutmix, mixup)] * 2)
    return Pairs(cut, share, rng.random(pairs), rng.random(pairs))


def mix(
    images: np.ndarray, labels: np.ndarray, num_classes: int, pairs: Pairs
) -> tuple[np.ndarray, np.ndarray]:
    """Mix the examples of pairs.

    Args:
      images: uint8 [2 pairs, height, width, channels].
      labels: int32 [2 pairs].
      num_classes: labels are below it.
      pairs: what has been drawn.

    Returns:
      The images, uint8 again, and labels float32 [2 pairs, num_classes] that sum to 1:
      the share of an example's own class is that of its own pixels.
    """
    mixed = np.empty_like(images)
    own = np.empty(len(images), np.float32)
    for pair, (cut, share, y, x) in enumerate(zip(*pairs, strict=True)):
        both = slice(2 * pair, 2 * pair + 2)
        if cut:
            mixed[both], own[both] = _cutmix(images[both], share, y, x)
        else:
            mixed[both], own[both] = _mixup(images[both], share), share
    classes = np.eye(num_classes, dtype=np.float32)[labels]
    others = classes.reshape(-1, 2, num_classes)[:, ::-1].reshape(classes.shape)
    own = own[:, None]
    return mixed, own * classes + (1 - own) * others


def _mixup(images: np.ndarray, share: float) -> np.ndarray:
    first, second = images.astype(np.float32)
    difference = np.float32(1 - share) * (second - first)
    return np.rint([first + difference, second - difference]).astype(np.uint8)


def _cutmix(
    images: np.ndarray, share: float, y: float, x: float
) -> tuple[np.ndarray, float]:
    """Swap a box of (1 - share) of the area, less what would lie outside."""
    _, height, width, _ = images.shape
    side = np.sqrt(1 - share)
    top, bottom = _interval(y, side, height)
    left, right = _interval(x, side, width)
    mixed = images.copy()
    mixed[:, top:bottom, left:right] = images[::-1, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _interval(middle: float, side: float, length: int) -> tuple[int, int]:
    start = int(middle * length) - int(side * length) // 2
    return max(start, 0), min(start + int(side * length), length)
