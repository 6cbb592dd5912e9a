"""RigL: drop the smallest weights, grow where the gradient is largest."""

from collections.abc import Mapping

import jax
import optax

from sparsejax.distributions import Distribution
from sparsejax.masks.layout import Layout, Where
from sparsejax.masks.patterned import Patterns
from sparsejax.schedules import Schedule
from sparsejax.sparse_optax._dynamic import Dynamic, drop_and_grow_transformation


def rigl(
    inner: optax.GradientTransformation | None = None,
    *,
    sparsity: float | None = None,
    masks: optax.Params | None = None,
    distribution: str | Distribution = "erk",
    where: Where = None,
    layout: Mapping[str, Layout] | None = None,
    pattern: Patterns = None,
    key: jax.Array | None = None,
    drop_fraction: float | Schedule = 0.3,
    start_at: int = 0,
    update_every: int = 100,
    stop_at: int | None = None,
    step_on_update: bool = True,
    accumulate: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Train a sparse network whose mask follows magnitudes and dense gradients.

    Every ``update_every`` steps each layer drops the active weights of least magnitude
    and grows as many where the gradient of the masked network is largest. Layers keep
    their number of weights. New weights start at zero, with empty optimizer slots, and
    take part in the step of the same call.

    Around an optimizer, the incoming updates are the dense gradients. As the last link
    of a chain, ``update`` needs them by keyword, ``grad=``; slots of earlier links are
    then out of reach and keep what they hold.

    Args:
      inner: the optimizer to run under the mask; None makes this the last link of a
        chain.
      sparsity: fraction of weights that are zero, in [0, 1), for a random first mask.
      masks: the first masks, as `static` takes them: of `sparsejax.saliency`, or of a
        lottery ticket. Takes the place of ``sparsity``; layers keep their numbers.
      distribution: "erk", "uniform", or a function ``(shapes, sparsity) -> kept`` as
        in `sparsejax.distributions`.
      where: which leaves are sparse; see `sparsejax.masks.select_leaves`.
      layout: dict from path regex to `sparsejax.masks.Layout`.
      pattern: `sparsejax.masks.NM` or `Block`, for all sparse leaves, or for some by a
        dict from path regex, of which the first that is found counts, or a function
        ``(path, shape) -> pattern``; None where weights are active by themselves. N:M
        says itself how sparse a leaf is, which leaves the distribution; where it holds
        for all, ``sparsity`` must agree. A layer drops its smallest weights, and each
        group is filled up. Blocks are dropped and grown as weights are; a layer has as
        many as fit into its share, and at least one.
      key: PRNG key of the first mask; ``jax.random.key(0)`` by default.
      drop_fraction: fraction of a layer's active weights that an update drops. A
        number falls by half a cosine to 0 at ``stop_at``, and is constant where
        ``stop_at`` is None; a function of the step is taken as it is.
      start_at: no update before this step. Steps count completed update calls; masks
        change at multiples of ``update_every``, and never at step 0.
      update_every: steps between updates.
      stop_at: no update from this step on.
      step_on_update: whether the optimizer steps on a call that changes masks. The
        released TensorFlow code does not, the PyTorch codes do.
      accumulate: grow by the sum of the gradients of this many last steps; more than
        1 keeps a float32 copy of the sparse leaves.

    Returns:
      An optax transformation with a `SparseState`.

    Raises:
      ValueError, TypeError: arguments that cannot be meant, here; a tree that does not
        fit, at ``init``; a missing ``grad=``, at ``update``.

    References:
      Evci et al. 2020, "Rigging the lottery: making all tickets winners", algorithm 1.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from sparsejax import sparse_optax
      >>> params = {"kernel": jnp.ones((8, 8)), "bias": jnp.zeros(8)}
      >>> tx = sparse_optax.rigl(optax.adamw(1e-3), sparsity=0.75, stop_at=75_000)
      >>> opt_state = tx.init(params)
      >>> params = sparse_optax.apply_masks(params, opt_state)
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, opt_state = tx.update(grads, opt_state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> int((params["kernel"] != 0).sum())
      16
    """
    arguments = Dynamic(
        sparsity,
        distribution,
        where,
        layout,
        key,
        drop_fraction,
        start_at,
        update_every,
        stop_at,
        step_on_update,
        accumulate,
        pattern,
        masks,
    )

    def grow(leaves, now):
        return {"grow": [x.pool(g) for x, g in zip(leaves, now.gradients, strict=True)]}

    return drop_and_grow_transformation(
        "rigl", inner, arguments, grow, needs_gradient=True
    )
