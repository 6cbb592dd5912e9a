"""From a masked model to a small one that computes the same.

The dependence between channels is read from the jaxpr (`coupling`), dead channels from
the weights (`liveness`), and what goes is put down in a plan (`plan`). Two back-ends
carry it out: `replay` for any function, `rebuild` for modules.
"""

from sparsejax.compaction.checkpoint import restore as restore
from sparsejax.compaction.checkpoint import save as save
from sparsejax.compaction.compact import channel_groups as channel_groups
from sparsejax.compaction.compact import compact as compact
from sparsejax.compaction.compact import compact_fn as compact_fn
from sparsejax.compaction.errors import CompactionError as CompactionError
from sparsejax.compaction.groups import Group as Group
from sparsejax.compaction.groups import Member as Member
from sparsejax.compaction.layers import register_compact as register_compact
from sparsejax.compaction.linen import linen_apply as linen_apply
from sparsejax.compaction.optimizer import (
    slice_optimizer_state as slice_optimizer_state,
)
from sparsejax.compaction.plan import Plan as Plan
from sparsejax.compaction.replay import Replay as Replay
from sparsejax.compaction.report import Report as Report
from sparsejax.compaction.statistics import (
    reestimate_statistics as reestimate_statistics,
)
