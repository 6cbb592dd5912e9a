"""Statistics of BatchNorm, estimated afresh for a compacted model."""

from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Model = TypeVar("Model", bound=nnx.Module)


def reestimate_statistics(model: Model, batches: Iterable[Any]) -> Model:
    """Return the model with running statistics that are averages over batches.

    A compacted model computes what the masked one does with the statistics that it
    has, so this is never needed for correctness; some released codes do it after
    pruning, Chase's for CIFAR among them. Every batch counts alike: means and
    variances (over a batch, not corrected for its size) are averaged over the batches.

    Args:
      model: a module with `flax.nnx.BatchNorm` layers. It stays as it is. All that is
        not BatchNorm runs as it is set to: call ``model.eval()`` before, or dropout
        draws from its streams.
      batches: inputs of the model, arrays or tuples of them where it takes several.

    Returns:
      A new module, in the mode in which ``model`` is.

    Raises:
      ValueError: the model has no BatchNorm, or there are no batches.

    References:
      Yin et al. 2023, "Dynamic sparsity is channel-level sparsity learner", released
      code; Ioffe and Szegedy 2015, "Batch normalization", algorithm 2.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from sparsejax import compaction
      >>> norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0), use_running_average=True)
      >>> batches = [jnp.array([[0.0], [2.0]]), jnp.array([[1.0], [5.0]])]
      >>> norm = compaction.reestimate_statistics(norm, batches)
      >>> float(norm.mean[0]), float(norm.var[0])
      (2.0, 2.5)
    """
    graphdef, state, rest = nnx.split(_measuring(model), nnx.BatchStat, ...)
    if not jax.tree.leaves(state):
        raise ValueError(
            "reestimate_statistics(model): the model must have nnx.BatchNorm layers "
            "with running statistics, got none."
        )

    @jax.jit
    def measure(state, rest, inputs):
        running = nnx.merge(graphdef, state, rest)
        running(*inputs)
        return nnx.state(running, nnx.BatchStat)

    average, count = jax.tree.map(jnp.zeros_like, state), 0
    for count, batch in enumerate(batches, start=1):
        found = measure(state, rest, batch if isinstance(batch, tuple) else (batch,))
        average = jax.tree.map(lambda a, x, n=count: a + (x - a) / n, average, found)
    if not count:
        raise ValueError(
            "reestimate_statistics(batches): at least one batch is needed, got none."
        )
    result = nnx.clone(model)
    nnx.update(result, average)
    return result


def _measuring(model: Model) -> Model:
    """Return a copy whose norms take over the statistics of a batch unchanged."""
    copy = nnx.clone(model)
    for _, module in nnx.iter_modules(copy):
        if isinstance(module, nnx.BatchNorm):
            module.use_running_average, module.momentum = False, 0.0
    return copy
