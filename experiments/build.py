"""From the fields of a config to the network and the optimizer that they name."""

import inspect

import jax
import optax
from flax import nnx

from configs import base
from experiments import data
from sparsejax import models, sparse_optax

METHODS = {
    "static": sparse_optax.static,
    "set": sparse_optax.set,
    "rigl": sparse_optax.rigl,
    "magnitude": sparse_optax.magnitude,
}


def model(config: base.Model, dataset: data.Dataset, *, key: jax.Array) -> nnx.Module:
    """Build the network for the images and classes of a dataset.

    Raises:
      ValueError: where `config.name` is unknown.
    """
    rngs = nnx.Rngs(params=key)
    height, width, channels = dataset.image_shape
    if config.name == "mlp":
        in_features = height * width * channels
        return models.MLP(in_features, config.widths, dataset.num_classes, rngs=rngs)
    if config.name == "resnet":
        return models.resnet_cifar(
            config.depth,
            dataset.num_classes,
            in_channels=channels,
            width=config.width,
            shortcut=config.shortcut,
            rngs=rngs,
        )
    raise ValueError(f"model.name must be 'mlp' or 'resnet', got {config.name!r}.")


def schedule(config: base.Optimizer, num_steps: int) -> optax.Schedule:
    """Build the learning rate: a linear warm-up, then half a cosine down to 0."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=num_steps,
    )


def optimizer(
    config: base.Config, *, key: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """Build the optimizer, inside the sparse algorithm that the config names.

    Args:
      config: its `optimizer`, `sparse` and `num_steps` are read.
      key: of the masks.

    Raises:
      ValueError: where `optimizer.name` or `sparse.method` is unknown.
    """
    dense = _dense_optimizer(config.optimizer, config.num_steps)
    sparse = config.sparse
    if sparse.method == "dense":
        return dense
    if sparse.method not in METHODS:
        raise ValueError(
            f"sparse.method must be 'dense' or one of {sorted(METHODS)}, got "
            f"{sparse.method!r}."
        )
    factory = METHODS[sparse.method]
    arguments = {
        "sparsity": sparse.sparsity,
        "distribution": sparse.distribution,
        "drop_fraction": sparse.drop_fraction,
        "start_at": sparse.start_at,
        "update_every": sparse.update_every,
        "stop_at": round(sparse.stop_fraction * config.num_steps),
        "key": key,
    }
    accepted = inspect.signature(factory).parameters
    return factory(dense, **{k: v for k, v in arguments.items() if k in accepted})


def _dense_optimizer(
    config: base.Optimizer, num_steps: int
) -> optax.GradientTransformationExtraArgs:
    learning_rate = schedule(config, num_steps)
    if config.name == "sgd":
        return optax.chain(
            optax.add_decayed_weights(config.weight_decay, mask=_kernels),
            optax.sgd(learning_rate, momentum=config.momentum, nesterov=True),
        )
    if config.name == "adamw":
        return optax.adamw(
            learning_rate, weight_decay=config.weight_decay, mask=_kernels
        )
    raise ValueError(f"optimizer.name must be 'sgd' or 'adamw', got {config.name!r}.")


def _kernels(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda param: param.ndim > 1, params)
