"""Masks from one look at a network: trees of masks, to train under or to prune by.

They are what `sparsejax.sparse_optax.static` takes as ``masks=``, and `prune` sets the
weights off them to zero.
"""

from sparsejax.saliency.grasp import grasp as grasp
from sparsejax.saliency.magnitude import magnitude as magnitude
from sparsejax.saliency.prune import prune as prune
from sparsejax.saliency.random import random as random
from sparsejax.saliency.snip import snip as snip
from sparsejax.saliency.synflow import synflow as synflow
from sparsejax.saliency.taylor import taylor as taylor
