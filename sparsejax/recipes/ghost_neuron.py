"""Ghost neurons as an activation function, for models that take one."""

import dataclasses
from collections.abc import Callable

import jax

from sparsejax.recipes._call import under_way
from sparsejax.recipes.ghost_activation import Kind, check_kind
from sparsejax.recipes.soften import soften


@dataclasses.dataclass(frozen=True)
class GhostNeuron:
    """An activation that reads the intensity of the model that it is part of.

    It is for models that take their activation as an argument, as those of
    `sparsejax.models` do; `add_ghosts` then gets ``neurons=None``. In a model without
    ghosts it is the plain activation.

    Attributes:
      kind: "swish" or "mish", as in `ghost_activation`.
      plain: what it ends as: a function with ReLUs, as `jax.nn.relu6`.

    Raises:
      ValueError: there is no such kind.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from sparsejax import recipes
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)),
      ...                        recipes.GhostNeuron("mish"))
      >>> images = jnp.ones((4, 2))
      >>> ghosted, _ = recipes.add_ghosts(model, images, neurons=None, skips=False)
      >>> bool((ghosted(images) == model(images)).any())
      False
    """

    kind: Kind = "swish"
    plain: Callable[[jax.Array], jax.Array] = jax.nn.relu

    def __post_init__(self):
        check_kind("GhostNeuron(kind=...)", self.kind)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the activation of x, of the same shape and dtype."""
        call = under_way.get()
        if call is None:
            return self.plain(x)
        return soften(self.plain, kind=self.kind)(call.intensity, x)


def neurons_of(module: object) -> dict[str, GhostNeuron]:
    """Return the ghost neurons that a module has as attributes, by name."""
    attributes = vars(module).items()
    return {name: own for name, own in attributes if isinstance(own, GhostNeuron)}
