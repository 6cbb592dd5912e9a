"""The compiled steps of a training: one that learns and one that tests."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from experiments import data, metrics
from experiments.state import State, Training, mask


def make_train_step(
    training: Training, dataset: data.Dataset
) -> Callable[[State, data.Batch], tuple[State, dict[str, jax.Array]]]:
    """Compile (state, batch) -> (next state, metrics); it takes the state's buffers.

    With `config.microbatches` above 1 the gradient is the mean over parts of the batch
    that are computed one after the other, in the memory of one of them. The optimizer
    sees this mean once: the steps of schedules and masks are optimizer steps, weights
    grow by the dense gradient of the whole batch, and a checkpoint never falls between
    two parts. (`optax.MultiSteps` would keep a second set of gradients in the state,
    and every part would pay for a conditional.) BatchNorm normalizes each part.
    """
    config = training.config

    def loss_fn(params, others, graphdef, batch):
        model = nnx.merge(graphdef, params, others)
        model.train()
        logits = model(dataset.normalize(batch["image"])).astype(jnp.float32)
        losses = cross_entropy(logits, batch["label"], config.label_smoothing)
        values = {
            "loss": losses.mean(),
            "accuracy": hits(logits, batch["label"]).mean(),
        }
        _, _, others = nnx.split(model, nnx.Param, ...)
        return values["loss"], (values, nnx.as_pure(others))

    grad_fn = jax.grad(loss_fn, has_aux=True)

    def mean_gradient(model, batch):
        graphdef, params, others = nnx.split(model, nnx.Param, ...)
        others = nnx.as_pure(others)
        if config.microbatches == 1:
            return grad_fn(params, others, graphdef, batch)

        def add(carry, part):
            total, others = carry
            grads, (values, others) = grad_fn(params, others, graphdef, part)
            return (jax.tree.map(jnp.add, total, grads), others), values

        zeros = jax.tree.map(jnp.zeros_like, params)
        parts = split_batch(batch, config.microbatches)
        (total, others), values = lax.scan(add, (zeros, others), parts)
        grads = jax.tree.map(lambda g: g / config.microbatches, total)
        return grads, (jax.tree.map(jnp.mean, values), others)

    def train_step(state, batch):
        modules = nnx.merge(training.graphdef, state)
        model, optimizer = modules["model"], modules["optimizer"]
        grads, (values, others) = mean_gradient(model, batch)
        nnx.update(model, others)
        optimizer.update(model, grads)
        if "average" in modules:
            step = optimizer.step[...]
            follow(modules["average"], model, decay=config.ema_decay, step=step)
            if training.is_sparse:
                mask(modules["average"], optimizer)
        return nnx.as_pure(nnx.state(modules)), values

    # The state leaves as it came, so that the next step needs no other program.
    shardings = jax.tree.map(lambda x: x.sharding, training.abstract)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def split_batch(batch: data.Batch, parts: int) -> data.Batch:
    """Return arrays [parts, batch / parts, ...].

    A part has every `parts`-th example, so that no example leaves its device.
    """

    def split(x):
        return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, batch)


def follow(
    average: nnx.Module, model: nnx.Module, *, decay: float, step: jax.Array
) -> None:
    """Move the average of a model towards it, in place.

    Weights and norm statistics become `decay * average + (1 - decay) * model`. In the
    first steps the decay is `(1 + step) / (10 + step)` at the most, so that the weights
    before training are forgotten.
    """
    step = step.astype(jnp.float32)
    kept = jnp.minimum(decay, (1 + step) / (10 + step))

    def mix(old, new):
        if not jnp.issubdtype(new.dtype, jnp.floating):
            return new
        return kept * old + (1 - kept) * new

    nnx.update(average, jax.tree.map(mix, nnx.state(average), nnx.state(model)))


def make_eval_step(
    training: Training, dataset: data.Dataset
) -> Callable[[State, data.Batch], dict[str, jax.Array]]:
    """Compile (state, batch) -> sums over the batch, by the weights of its examples.

    Where a training averages its weights, the average is tested.
    """

    @jax.jit
    def eval_step(state, batch):
        model = training.tested(state)
        labels, weights = batch["label"], batch["weight"]
        logits = model(dataset.normalize(batch["image"])).astype(jnp.float32)
        return {
            "loss": (cross_entropy(logits, labels) * weights).sum(),
            "accuracy": (hits(logits, labels) * weights).sum(),
            "count": weights.sum(),
        }

    return eval_step


def cross_entropy(
    logits: jax.Array, labels: jax.Array, smoothing: float = 0.0
) -> jax.Array:
    """Return the loss of each example.

    Args:
      logits: float32 [batch, classes].
      labels: int32 [batch], or float32 [batch, classes]: the share of each class.
      smoothing: the share of the label that is spread over all classes.
    """
    if labels.ndim == 1 and not smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if labels.ndim == 1:
        labels = jax.nn.one_hot(labels, logits.shape[-1])
    labels = optax.smooth_labels(labels, smoothing)
    return optax.softmax_cross_entropy(logits, labels)


def hits(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return whether the likeliest class is that of the label, or its largest share."""
    classes = labels if labels.ndim == 1 else labels.argmax(axis=-1)
    return logits.argmax(axis=-1) == classes


def evaluate(
    eval_step: Callable[[State, data.Batch], dict[str, jax.Array]],
    state: State,
    batches: Iterable[Any],
) -> metrics.Record:
    """Return means over all examples, each counted once."""
    sums = None
    for batch in batches:
        part = eval_step(state, batch)
        sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
    sums = jax.device_get(sums)
    count = sums.pop("count")
    return {f"test/{name}": float(total / count) for name, total in sums.items()}
