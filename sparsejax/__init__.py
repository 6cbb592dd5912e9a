"""Sparse training for JAX, and the small dense models that it ends in."""

from sparsejax import distributions, masks, schedules, sparse_optax

__all__ = ["distributions", "masks", "schedules", "sparse_optax"]
