"""Where the masks of a ToST comparison come from: the dense network at its start."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from experiments import data
from experiments.steps import cross_entropy
from sparsejax import saliency

SOURCES = ("random", "magnitude", "snip", "grasp", "synflow")
# Images of each class that a mask is found with.
_IMAGES_PER_CLASS = 10
# The authors of GraSP divide logits by it.
_TEMPERATURE = 200


class Cell(NamedTuple):
    """A mask: where it comes from, and what all runs with it share."""

    source: str
    sparsity: float
    seed: int


def find_masks(cell: Cell, model: nnx.Module, dataset: data.Dataset) -> Any:
    """Return the masks of a cell, found on its first network in training mode.

    Raises:
      ValueError: there is no such source.
    """
    source, sparsity, seed = cell
    graphdef, params, others = nnx.split(model, nnx.Param, ...)
    scoring = _scoring_batch(dataset, seed)

    def loss(params, batch, temperature=1):
        logits = nnx.merge(graphdef, params, others, copy=True)(batch["image"])
        return cross_entropy(logits / temperature, batch["label"]).mean()

    if source in ("random", "dense"):
        key = jax.random.fold_in(jax.random.key(seed), 1)
        return saliency.random(params, sparsity=sparsity, key=key, scope="layer")
    if source == "magnitude":
        return saliency.magnitude(params, sparsity=sparsity)
    if source == "snip":
        return saliency.snip(loss, params, [scoring], sparsity=sparsity)
    if source == "grasp":
        cool = functools.partial(loss, temperature=_TEMPERATURE)
        return saliency.grasp(cool, params, [scoring], sparsity=sparsity)
    if source != "synflow":
        raise ValueError(f"A source must be one of {SOURCES}, got {source!r}.")
    tested = nnx.clone(model)
    tested.eval()
    graphdef, params, others = nnx.split(tested, nnx.Param, ...)
    apply = lambda params, x: nnx.merge(graphdef, params, others, copy=True)(x)
    return saliency.synflow(apply, params, (1, *dataset.image_shape), sparsity=sparsity)


def _scoring_batch(dataset: data.Dataset, seed: int) -> dict[str, Any]:
    """Draw a few training images of every class."""
    rng = np.random.default_rng(seed)
    labels: Any = dataset.train.labels
    chosen = np.concatenate(
        [
            rng.choice(np.flatnonzero(labels == label), _IMAGES_PER_CLASS, False)
            for label in range(dataset.num_classes)
        ]
    )
    images: Any = dataset.train.images
    return {"image": dataset.normalize(images[chosen]), "label": labels[chosen]}
