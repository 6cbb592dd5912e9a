"""From the fields of a config to the network and the optimizer that they name."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from configs import base
from experiments import data
from sparsejax import compaction, models, schedules, sparse_optax

NETWORKS = {
    "mlp": models.MLP,
    "resnet": models.resnet,
    "resnet_cifar": models.resnet_cifar,
    "vgg_cifar": models.vgg_cifar,
    "vit": models.ViT,
    "wide_resnet": models.wide_resnet,
}
METHODS = {
    "static": sparse_optax.static,
    "set": sparse_optax.set,
    "rigl": sparse_optax.rigl,
    "srigl": sparse_optax.srigl,
    "chase": sparse_optax.chase,
    "magnitude": sparse_optax.magnitude,
}

# Of all weights, what chase holds beyond its budget at first, in the paper.
_SOFT_EXTRA = 0.05


def model(config: base.Model, dataset: data.Dataset, *, key: jax.Array) -> nnx.Module:
    """Build the network for the images and classes of a dataset.

    Raises:
      ValueError: where `config.name` is unknown.
    """
    if config.name not in NETWORKS:
        raise ValueError(
            f"model.name must be one of {sorted(NETWORKS)}, got {config.name!r}."
        )
    factory = NETWORKS[config.name]
    height, width, channels = dataset.image_shape
    arguments = vars(config) | {
        "in_features": height * width * channels,
        "widen": config.width,
        "image_size": height,
        "in_channels": channels,
        "num_classes": dataset.num_classes,
        "rngs": nnx.Rngs(params=key, dropout=jax.random.fold_in(key, 1)),
    }
    return factory(**_accepted(factory, arguments))


def compute_in(network: nnx.Module, dtype: str) -> None:
    """Let all layers compute in a dtype, in place; their weights keep their own.

    Raises:
      ValueError: where it is neither "float32" nor "bfloat16".
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}.")
    if dtype != "float32":
        for _, layer in nnx.iter_modules(network):
            if hasattr(layer, "dtype"):
                layer.dtype = jnp.dtype(dtype)  # pyright: ignore


def _accepted(factory: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    call = factory.__init__ if isinstance(factory, type) else factory
    parameters = inspect.signature(call).parameters
    return {name: x for name, x in arguments.items() if name in parameters}


def channel_groups(
    config: base.Config, dataset: data.Dataset
) -> compaction.Report | None:
    """Find the channels that live and die together; None where no method asks."""
    factory = METHODS.get(config.sparse.method)
    if factory is None or "groups" not in inspect.signature(factory).parameters:
        return None
    network = nnx.eval_shape(
        lambda: model(config.model, dataset, key=jax.random.key(0))
    )
    network.eval()
    images = jax.ShapeDtypeStruct((1, *dataset.image_shape), np.float32)
    return compaction.channel_groups(network, images)


def optimizer(
    config: base.Config, *, key: jax.Array, groups: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Build the optimizer, inside the sparse algorithm that the config names.

    Args:
      config: its `optimizer`, `sparse` and `num_steps` are read.
      key: of the masks.
      groups: of the network's channels, for the methods that remove them.

    Raises:
      ValueError: where a name is unknown.
    """
    dense = _dense_optimizer(config.optimizer, config.num_steps)
    sparse = config.sparse
    if sparse.initial not in ("dense", "variance", "std"):
        raise ValueError(
            "sparse.initial must be 'dense', 'variance' or 'std', got "
            f"{sparse.initial!r}."
        )
    if sparse.method == "dense":
        return dense
    if sparse.method not in METHODS:
        raise ValueError(
            f"sparse.method must be 'dense' or one of {sorted(METHODS)}, got "
            f"{sparse.method!r}."
        )
    factory = METHODS[sparse.method]
    stop_at = round(sparse.stop_fraction * config.num_steps)
    stop_removal_at = round(sparse.stop_removal_fraction * stop_at)
    arguments = vars(sparse) | {
        "groups": groups,
        "stop_at": stop_at,
        "stop_removal_at": stop_removal_at,
        "key": key,
    }
    if sparse.soft_end:
        arguments["soft_extra"] = schedules.cosine_between(
            _SOFT_EXTRA, sparse.soft_end, stop_removal_at
        )
    return factory(dense, **_accepted(factory, arguments))


def schedule(config: base.Optimizer, num_steps: int) -> optax.Schedule:
    """Build the learning rate: a linear warm-up from 0, then its decay.

    Raises:
      ValueError: where `config.decay` is unknown.
    """
    if config.decay == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=config.learning_rate,
            warmup_steps=config.warmup_steps,
            decay_steps=num_steps,
        )
    if config.decay != "steps":
        raise ValueError(
            f"optimizer.decay must be 'cosine' or 'steps', got {config.decay!r}."
        )
    falling = optax.piecewise_constant_schedule(
        config.learning_rate, dict.fromkeys(config.at, config.factor)
    )
    if not config.warmup_steps:
        return falling
    rise = optax.linear_schedule(0.0, 1.0, config.warmup_steps)
    return lambda step: rise(step) * falling(step)


def _dense_optimizer(
    config: base.Optimizer, num_steps: int
) -> optax.GradientTransformationExtraArgs:
    learning_rate, decay = schedule(config, num_steps), config.weight_decay
    if config.decayed not in _DECAYED:
        raise ValueError(
            f"optimizer.decayed must be one of {list(_DECAYED)}, got "
            f"{config.decayed!r}."
        )
    decayed = functools.partial(
        jax.tree_util.tree_map_with_path, _DECAYED[config.decayed]
    )
    if config.name == "sgd":
        step = optax.chain(
            optax.add_decayed_weights(decay, mask=decayed),
            optax.sgd(learning_rate, momentum=config.momentum, nesterov=True),
        )
    elif config.name == "adamw":
        step = optax.adamw(learning_rate, weight_decay=decay, mask=decayed)
    else:
        raise ValueError(
            f"optimizer.name must be 'sgd' or 'adamw', got {config.name!r}."
        )
    if not config.clip_norm:
        return step
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), step)


# Whether the parameter at a path decays.
_DECAYED = {
    "kernels": lambda path, param: param.ndim > 1,
    "all": lambda path, param: True,
    "but_norms": lambda path, param: "norm" not in jax.tree_util.keystr(path),
}
