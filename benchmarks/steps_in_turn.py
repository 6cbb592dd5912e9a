"""Training steps with and without sparsity, side by side on one device."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from configs import base, cifar10_srigl, imagenet_srigl
from experiments import data, timing
from experiments.state import prepare
from experiments.steps import make_train_step

METHODS = ("dense", "static", "rigl", "srigl")


def networks(cifar_batch: int, imagenet_batch: int) -> dict[str, base.Config]:
    """Return the configs of what is measured: their networks, optimizers and sizes."""
    cifar, imagenet = cifar10_srigl.get_config(), imagenet_srigl.get_config()
    return {
        f"ResNet-18, CIFAR, batch {cifar_batch}": dataclasses.replace(
            cifar, batch_size=cifar_batch
        ),
        f"ResNet-50 at 224, batch {imagenet_batch}": dataclasses.replace(
            imagenet, batch_size=imagenet_batch, dtype="float32"
        ),
    }


def stepper(config: base.Config, method: str) -> Callable[[], jax.Array]:
    """Return a function that takes one training step on a batch of noise.

    Masks do not change: `mask_update.py` measures that.
    """
    never = {"update_every": 10**9, "remove_every": 10**9, "accumulate": 1}
    sparse = dataclasses.replace(config.sparse, method=method, **never)
    config = dataclasses.replace(config, sparse=sparse)
    size, num_classes = (224, 1000) if config.data.image_size else (32, 10)
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(config.batch_size, size, size, 3), dtype=np.uint8)
    labels = rng.integers(num_classes, size=config.batch_size, dtype=np.int32)
    split, moments = data.Split(images, labels), np.full(3, 128, np.float32)
    batch = jax.device_put({"image": images, "label": labels})
    dataset = data.Dataset(config.data, split, split, num_classes, moments, moments)

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    training = prepare(config, dataset, device)
    step = make_train_step(training, dataset)
    held: list[Any] = [training.init()]

    def run() -> jax.Array:
        held[0], values = step(held[0], batch)
        return jax.block_until_ready((held[0], values))[1]["loss"]

    return run


def measure(
    seconds: float, configs: dict[str, base.Config], methods: Sequence[str] = METHODS
) -> dict[str, dict[str, float]]:
    """Time the steps of all methods in turn, network after network."""
    rows = {}
    for name, config in configs.items():
        calls = {method: stepper(config, method) for method in methods}
        times = timing.in_turn(calls, seconds=seconds, min_rounds=5)
        for method in methods:
            median, low, high = timing.median_and_interval(1e3 * times[method])
            ratio = timing.median_and_interval(times[method] / times["dense"])[0]
            rows[f"{name}, {method}"] = {
                "step ms": median,
                "from": low,
                "to": high,
                "step / dense": ratio,
                "images/s": 1e3 * config.batch_size / median,
            }
    return rows
