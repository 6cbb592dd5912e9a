"""The shortest training loop: a Flax NNX model, its optimizer, and images in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from experiments import data


@nnx.jit
def train_step(
    model: nnx.Module, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array
) -> jax.Array:
    """Take one step on a batch, in place, and return the loss."""

    def loss_fn(model):
        logits = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def fit(
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    dataset: data.Dataset,
    *,
    num_steps: int,
    batch_size: int = 128,
    seed: int = 0,
) -> np.ndarray:
    """Train a model in place.

    Args:
      model: maps images [batch, height, width, channels] to logits.
      optimizer: of the model.
      dataset: its training images are used, its normalisation too.
      num_steps: how many.
      batch_size: images in a step.
      seed: of the order of the images.

    Returns:
      The loss of every step.
    """
    batches = dataset.train_batches(batch_size, seed=seed)
    losses = []
    for _ in tqdm(range(num_steps), unit="step"):
        batch = next(batches)
        images, labels = dataset.normalize(batch["image"]), jnp.asarray(batch["label"])
        losses.append(train_step(model, optimizer, images, labels))
    return np.asarray(losses)


def accuracy(model: nnx.Module, dataset: data.Dataset) -> float:
    """Return the share of the test images that a model classifies right."""
    logits = model(dataset.normalize(dataset.test.images))
    return float(np.mean(logits.argmax(axis=-1) == dataset.test.labels))
