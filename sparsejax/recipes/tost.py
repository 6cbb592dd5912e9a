"""The whole recipe, around a training loop that stays its user's."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import chex
import jax
import optax
from flax import nnx
from jax.tree_util import Partial

from sparsejax.recipes.add_ghosts import add_ghosts, set_intensity
from sparsejax.recipes.ghost_activation import Kind
from sparsejax.recipes.remove_ghosts import remove_ghosts
from sparsejax.recipes.rescaled_init import rescaled_init
from sparsejax.saliency.prune import prune
from sparsejax.schedules import linear_fade


@dataclasses.dataclass(frozen=True)
class ToST:
    """Train a sparse network better, under any mask.

    First weights are pruned, ghosts added and tensors rescaled (`start`); labels are
    smoothed (`loss`); ghosts fade step by step and are taken out (`before_step`); from
    then on the network is the plain one, and may be selected (`selects`). Every part
    can be left out.

    Masks come from `sparsejax.saliency`, a lottery ticket, or a transformation of
    `sparsejax.sparse_optax` by `get_masks`, always for the plain model. Around the
    optimizer goes `sparse_optax.static` with these masks, `rigl` or `set` that start
    from them, or the transformation that drew them: ghosts are dense in all of them.

    Attributes:
      ghost_steps: steps until the ghosts are gone; the authors' schedule has its first
        fall of the learning rate there, after 90 of 182 epochs. Let some follow: norms
        still adapt.
      neurons: as in `add_ghosts`.
      skips: as in `add_ghosts`.
      label_smoothing: a class has 1 less this, the others have equal parts of it.
      iterations: of `rescaled_init`; 0 leaves the tensors as they are.

    Raises:
      ValueError: a value that cannot be meant, or ``ghost_steps`` without ghosts or
        ghosts without steps.

    References:
      Jaiswal et al. 2022, "Training your sparse neural network better with any mask",
      section 3. The fade of the ghosts is ours.

    Example:
      >>> import itertools, jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from sparsejax import recipes, saliency, sparse_optax
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(
      ...     nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.relu,
      ...     lambda x: x.mean(axis=(1, 2)), nnx.Linear(4, 4, rngs=rngs))
      >>> batch = jax.random.normal(jax.random.key(0), (4, 6, 6, 3)), jnp.arange(4)
      >>> masks = saliency.random(
      ...     nnx.state(model, nnx.Param), sparsity=0.5, key=jax.random.key(0))
      >>> recipe = recipes.ToST(ghost_steps=1, skips=False, iterations=1)

      Hard labels before training, smooth ones while training:

      >>> def hard_loss(model, batch):
      ...     losses = optax.softmax_cross_entropy_with_integer_labels
      ...     return losses(model(batch[0]), batch[1]).mean()
      >>> model = recipe.start(
      ...     model, batch[0], loss=hard_loss, batches=itertools.repeat(batch),
      ...     masks=masks)
      >>> tx = sparse_optax.static(optax.sgd(0.1), masks=masks)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> @nnx.jit
      ... def train_step(model, optimizer, batch):
      ...     loss = lambda model: recipe.loss(model(batch[0]), batch[1]).mean()
      ...     optimizer.update(model, nnx.grad(loss)(model))
      >>> for step in range(2):
      ...     model, optimizer = recipe.before_step(step, model, optimizer)
      ...     train_step(model, optimizer, batch)
      >>> type(model).__name__, recipe.selects(step)
      ('Sequential', True)
    """

    ghost_steps: int
    neurons: Kind | None = "swish"
    skips: bool = True
    label_smoothing: float = 0.1
    iterations: int = 180

    def __post_init__(self):
        for name in ("ghost_steps", "iterations"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(
                    f"ToST({name}=...) must be an integer of at least 0, got {value!r}."
                )
        if self.has_ghosts != (self.ghost_steps > 0):
            raise ValueError(
                "ToST(ghost_steps=...) must be above 0 where there are ghosts, and 0 "
                f"where there are none, got {self.ghost_steps} with neurons="
                f"{self.neurons!r} and skips={self.skips}."
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                "ToST(label_smoothing=...) must lie in [0, 1), got "
                f"{self.label_smoothing!r}."
            )

    @property
    def has_ghosts(self) -> bool:
        """Whether the network has ghosts at first."""
        return self.neurons is not None or self.skips

    def start(
        self,
        model: nnx.Module,
        *inputs: Any,
        loss: Callable[[Any, Any], jax.Array],
        batches: Iterable[Any],
        masks: Any,
    ) -> Any:
        """Return the network of the first step: pruned, with ghosts, and rescaled.

        Args:
          model: dense and plain, in the mode of training; it stays as it is.
          *inputs: example inputs, as in `add_ghosts`.
          loss: ``(model, batch) -> loss``, with hard labels; the mode of the model is
            the one that `rescaled_init` asks for.
          batches: as in `rescaled_init`.
          masks: as there, for the parameters of ``model``.

        Raises:
          ValueError, TypeError: as `add_ghosts` and `rescaled_init`.
        """
        start = nnx.clone(model)
        nnx.update(start, prune(nnx.state(start, nnx.Param), masks))
        if self.has_ghosts:
            start, _ = add_ghosts(
                start, *inputs, neurons=self.neurons, skips=self.skips
            )
        if self.iterations:
            looked_at = nnx.clone(start)
            looked_at.eval()
            looked_at.set_attributes(
                use_running_average=False, raise_if_not_found=False
            )
            graphdef, params, others = nnx.split(looked_at, nnx.Param, ...)
            nnx.update(
                start,
                rescaled_init(
                    Partial(_merged_loss, Partial(loss), graphdef, others),
                    params,
                    batches,
                    masks=masks,
                    iterations=self.iterations,
                ),
            )
        return start

    def intensity(self, step: chex.Numeric) -> chex.Numeric:
        """Return how much of the ghosts there is in a step: from 1, linearly to 0."""
        return linear_fade(self.ghost_steps)(step) if self.has_ghosts else 0.0

    def before_step(self, step: int, model: Any, optimizer: Any) -> tuple[Any, Any]:
        """Return the model and its optimizer as a step needs them.

        Before ``ghost_steps`` the model is the same with another intensity, at
        ``ghost_steps`` both come out without ghosts, and then they stay what they are.
        The step that is compiled for ghosts is so compiled once more, without.

        Args:
          step: how many are done.
          model: what `start` returned, or this.
          optimizer: an ``nnx.Optimizer`` of it, or any state of one.
        """
        if step == self.ghost_steps and self.has_ghosts:
            return remove_ghosts(model), remove_ghosts(optimizer)
        if step < self.ghost_steps:
            set_intensity(model, self.intensity(step))
        return model, optimizer

    def loss(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """Return the cross-entropy with smoothed labels of each example, [batch].

        It is for training; losses of a test are plain cross-entropies.

        Args:
          logits: [batch, classes].
          labels: integers [batch].
        """
        classes = logits.shape[-1]
        hard = jax.nn.one_hot(labels, classes, dtype=logits.dtype)
        smooth = optax.smooth_labels(hard, self.smoothing(classes))
        return optax.softmax_cross_entropy(logits, smooth)

    def smoothing(self, classes: int) -> float:
        """Return the label smoothing as `optax.smooth_labels` counts it.

        There a class keeps its share of what is spread over all.
        """
        return self.label_smoothing * classes / (classes - 1)

    def selects(self, step: int) -> bool:
        """Return whether the network is the plain one in a step.

        Only then may a checkpoint be the best: a network with ghosts is another one.
        """
        return step >= self.ghost_steps


def _merged_loss(loss: Partial, graphdef, others, params, batch) -> jax.Array:
    return loss(nnx.merge(graphdef, params, others, copy=True), batch)
