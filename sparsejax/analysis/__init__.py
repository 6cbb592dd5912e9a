"""Look at masks, in tables and pictures, and count operations."""

from sparsejax.analysis.channels import amenable_channels as amenable_channels
from sparsejax.analysis.channels import channel_scores as channel_scores
from sparsejax.analysis.flops import flops as flops
from sparsejax.analysis.neurons import births_and_deaths as births_and_deaths
from sparsejax.analysis.neurons import fan_in as fan_in
from sparsejax.analysis.neurons import fan_in_over_time as fan_in_over_time
from sparsejax.analysis.overlap import mask_overlap as mask_overlap
from sparsejax.analysis.plots import plot_densities as plot_densities
from sparsejax.analysis.plots import plot_input_connections as plot_input_connections
from sparsejax.analysis.plots import plot_mask as plot_mask
from sparsejax.analysis.plots_channels import plot_channels as plot_channels
from sparsejax.analysis.plots_channels import plot_compaction as plot_compaction
from sparsejax.analysis.plots_channels import plot_fan_in as plot_fan_in
from sparsejax.analysis.plots_over_time import (
    plot_births_and_deaths as plot_births_and_deaths,
)
from sparsejax.analysis.plots_over_time import plot_neurons as plot_neurons
from sparsejax.analysis.plots_over_time import plot_overlap as plot_overlap
from sparsejax.analysis.plots_over_time import plot_weights as plot_weights
from sparsejax.analysis.summary import summary as summary
