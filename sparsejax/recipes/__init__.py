"""Better training of sparse networks under any mask (ToST)."""

from sparsejax.recipes._ghosted import GhostIntensity as GhostIntensity
from sparsejax.recipes.add_ghosts import GhostReport as GhostReport
from sparsejax.recipes.add_ghosts import add_ghosts as add_ghosts
from sparsejax.recipes.add_ghosts import set_intensity as set_intensity
from sparsejax.recipes.ghost_activation import ghost_activation as ghost_activation
from sparsejax.recipes.ghost_neuron import GhostNeuron as GhostNeuron
from sparsejax.recipes.ghost_skip import GhostSkip as GhostSkip
from sparsejax.recipes.remove_ghosts import is_ghost as is_ghost
from sparsejax.recipes.remove_ghosts import remove_ghosts as remove_ghosts
from sparsejax.recipes.rescaled_init import rescaled_init as rescaled_init
from sparsejax.recipes.soften import relus as relus
from sparsejax.recipes.soften import soften as soften
from sparsejax.recipes.tost import ToST as ToST
