"""How each primitive treats channels, one file for each family.

A rule says three things of an equation: which axes of its outputs are which axes of
its inputs (`couple`), what is known of its outputs (`evaluate`), and how to apply it
to inputs without some of their channels (`rewrite`).
"""

from sparsejax.compaction.rules import (  # noqa: F401  each registers its rules
    contraction,
    control,
    convolution,
    elementwise,
    indexing,
    joining,
    positional,
    reduction,
    reshape,
    shape,
    window,
)
from sparsejax.compaction.rules.registry import Rule as Rule
from sparsejax.compaction.rules.registry import rule_of as rule_of
