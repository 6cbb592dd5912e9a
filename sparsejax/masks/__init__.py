"""Masks as arrays: selection, layouts, first masks and their updates.

Arrays in, arrays out; nothing here knows optimizers or models.
"""

from sparsejax.masks import (
    channels,
    coupled,
    fan_in,
    initial,
    layout,
    patterned,
    patterns,
    selection,
    unstructured,
)
from sparsejax.masks.blend import blend, masked
from sparsejax.masks.initial import random_mask, random_scores, sparse_init
from sparsejax.masks.layout import Layout, select_leaves
from sparsejax.masks.patterns import NM, Block, block_mask, nm_mask
from sparsejax.masks.selection import global_top_k_mask, kth_largest, top_k_mask

__all__ = [
    "NM",
    "Block",
    "Layout",
    "blend",
    "block_mask",
    "channels",
    "coupled",
    "fan_in",
    "global_top_k_mask",
    "initial",
    "kth_largest",
    "layout",
    "masked",
    "nm_mask",
    "patterned",
    "patterns",
    "random_mask",
    "random_scores",
    "select_leaves",
    "selection",
    "sparse_init",
    "top_k_mask",
    "unstructured",
]
