"""What a network's parameters are, without making one."""

from collections.abc import Callable

import jax
import pytest
from flax import nnx

from sparsejax.masks.layout import named_leaves

Build = Callable[[nnx.Rngs], nnx.Module]


class Parameters:
    """Numbers and shapes of the parameters of an abstract network."""

    def leaves(self, build: Build) -> dict[str, jax.ShapeDtypeStruct]:
        model = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
        return named_leaves(nnx.state(model, nnx.Param))

    def count(self, build: Build) -> int:
        return sum(leaf.size for leaf in self.leaves(build).values())

    def kernels(self, build: Build) -> list[tuple[int, ...]]:
        """List the shapes of all kernels in a canonical order."""
        leaves = self.leaves(build)
        return sorted(leaves[p].shape for p in leaves if p.endswith("kernel"))


@pytest.fixture
def parameters() -> Parameters:
    return Parameters()
