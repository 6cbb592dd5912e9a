"""Look at masks, a table and pictures, and count operations."""

from sparsejax.analysis.flops import flops as flops
from sparsejax.analysis.plots import plot_densities as plot_densities
from sparsejax.analysis.plots import plot_input_connections as plot_input_connections
from sparsejax.analysis.plots import plot_mask as plot_mask
from sparsejax.analysis.summary import summary as summary
