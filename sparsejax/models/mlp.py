"""Multi-layer perceptrons."""

from collections.abc import Sequence

import jax
from flax import nnx


class MLP(nnx.Module):
    """Linear layers with a ReLU between each and the next.

    Inputs of any shape are flattened behind their first (batch) axis, so the same
    network takes vectors and images.

    Args:
      in_features: size of one flattened input.
      widths: sizes of the hidden layers; may be empty.
      num_classes: size of the output.
      dropout_rate: of the hidden layers, in training; call `model.train()` or
        `model.eval()`.
      rngs: NNX random streams; `params` is used, and `dropout` where there is a rate.
    """

    def __init__(
        self,
        in_features: int,
        widths: Sequence[int],
        num_classes: int,
        *,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        sizes = (in_features, *widths, num_classes)
        self.layers = nnx.List(
            nnx.Linear(n_in, n_out, rngs=rngs)
            for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True)
        )
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs if dropout_rate else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits [batch, num_classes] for x [batch, ...]."""
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers[:-1]:
            x = self.dropout(nnx.relu(layer(x)))
        return self.layers[-1](x)


def lenet_300_100(
    in_features: int = 784, num_classes: int = 10, *, rngs: nnx.Rngs
) -> MLP:
    """Build LeNet-300-100 (LeCun et al. 1998): 266,610 parameters on 28x28 images."""
    return MLP(in_features, (300, 100), num_classes, rngs=rngs)
