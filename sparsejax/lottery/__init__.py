"""Lottery tickets: masks found by training, and the structure that is in them.

`iterative_magnitude_pruning` trains, prunes and rewinds. `refill` and `regroup` turn
what it finds into masks that run fast: of whole channels, which
`sparsejax.compaction` removes, and of dense blocks, which `sparsejax.serving` runs.
"""

from sparsejax.lottery._partition import partition_at_random as partition_at_random
from sparsejax.lottery._partition import partition_by_cut as partition_by_cut
from sparsejax.lottery.imp import Round as Round
from sparsejax.lottery.imp import (
    iterative_magnitude_pruning as iterative_magnitude_pruning,
)
from sparsejax.lottery.imp import prune as prune
from sparsejax.lottery.refill import refill as refill
from sparsejax.lottery.refill import refill_tree as refill_tree
from sparsejax.lottery.regroup import Regrouped as Regrouped
from sparsejax.lottery.regroup import RegroupedTree as RegroupedTree
from sparsejax.lottery.regroup import regroup as regroup
from sparsejax.lottery.regroup import regroup_tree as regroup_tree
from sparsejax.lottery.rounds import restore_round as restore_round
from sparsejax.lottery.rounds import save_round as save_round
from sparsejax.lottery.scores import feature_norm as feature_norm
from sparsejax.lottery.scores import feature_saliency as feature_saliency
