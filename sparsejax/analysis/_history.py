"""Masks that were recorded at several steps."""

from collections.abc import Mapping
from typing import Any

import chex

from sparsejax.masks.layout import named_leaves


def masks_by_path(
    what: str, history: Mapping[int, chex.ArrayTree]
) -> dict[str, list[Any]]:
    """Return for each path its masks, one for each step.

    Raises:
      ValueError: there is no step, or the masks belong to different networks.
    """
    if not history:
        raise ValueError(f"{what}(history) must have a step, got none.")
    named = [named_leaves(masks) for masks in history.values()]
    shapes = [{path: mask.shape for path, mask in one.items()} for one in named]
    for step, own in zip(history, shapes, strict=True):
        if own != shapes[0]:
            raise ValueError(
                f"{what}(history) must have masks of one network, got the shapes "
                f"{shapes[0]} at first and {own} at step {step}."
            )
    return {path: [one[path] for one in named] for path in named[0]}
