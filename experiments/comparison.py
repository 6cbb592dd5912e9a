"""Training one method at several sparsities and under several seeds, all at once."""

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from configs import base
from experiments import build, comparison_report, data, seeds
from sparsejax import sparse_optax


def train(
    config: base.Config,
    dataset: data.Dataset,
    sparsities: Sequence[float],
    num_seeds: int,
    initial: str,
) -> list[comparison_report.Run]:
    """Train the method of a config at each sparsity under each seed, all together.

    Args:
      config: the recipe; its `sparse.sparsity` and `seed` are left aside.
      dataset: what to train and test on.
      sparsities: of the trainings.
      num_seeds: the seeds are 0, 1, ...
      initial: what the active weights start from: "dense", the initializer of the
        layers, or a variant of `sparse_optax.reinitialize`.

    Returns:
      What each training came to after its last step.

    Raises:
      ValueError: where the network is no MLP, or rounds of `log_every` steps do not
        make `num_steps`.
    """
    if config.model.name != "mlp":
        raise ValueError(f"config.model.name must be 'mlp', got {config.model.name!r}.")
    if config.num_steps % config.log_every:
        raise ValueError(
            f"config.num_steps must be a multiple of log_every={config.log_every}, got "
            f"{config.num_steps}."
        )
    # What depends on the sparsity is in the states: one optimizer serves them all.
    tx = build.optimizer(config, key=jax.random.key(0))
    graphdef = nnx.split(build.model(config.model, dataset, key=jax.random.key(0)))[0]

    def logits(params, batch):
        return nnx.merge(graphdef, params)(dataset.normalize(batch["image"]))

    def train_step(state, batch):
        def loss_fn(params):
            return optax.softmax_cross_entropy_with_integer_labels(
                logits(params, batch), batch["label"]
            ).mean()

        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    def eval_step(state, batch):
        hits = logits(state[0], batch).argmax(axis=-1) == batch["label"]
        return (hits * batch["weight"]).sum()

    def every(f, batch_axis):  # over sparsities, then over seeds
        return jax.vmap(jax.vmap(f, in_axes=(0, batch_axis)), in_axes=(0, None))

    def train_round(states, batches):
        return jax.lax.scan(every(train_step, 0), states, batches)

    started = time.perf_counter()
    states = first_states(config, dataset, sparsities, num_seeds, initial)
    train_round, losses = jax.jit(train_round, donate_argnums=0), []
    with tqdm(total=config.num_steps, desc=config.sparse.method) as progress:
        for batches in seeds.rounds(config, dataset, num_seeds, config.log_every):
            states, loss = train_round(states, batches)
            losses.append(jax.device_get(loss))
            progress.update(len(loss))
    count_hits = jax.jit(every(eval_step, None))
    parts = dataset.eval_batches(config.eval_batch_size)
    hits = np.sum([jax.device_get(count_hits(states, part)) for part in parts], axis=0)
    minutes = (time.perf_counter() - started) / 60

    losses = np.concatenate(losses)[-math.ceil(config.num_steps / 10) :].mean(axis=0)
    if config.sparse.method != "dense":
        masks = jax.device_get(sparse_optax.get_masks(states[1]))
    else:
        masks = jax.tree.map(lambda param: np.ones(param.shape, bool), states[0])
    kernels = [mask for mask in jax.tree.leaves(masks) if mask.ndim == 4]
    return [
        {
            "method": config.sparse.method,
            "sparsity": sparsity,
            "seed": seed,
            "test_accuracy": float(hits[i, seed]) / dataset.num_test,
            "train_loss": float(losses[i, seed]),
            **_structure([kernel[i, seed] for kernel in kernels], dataset),
            "minutes": minutes,
        }
        for i, sparsity in enumerate(sparsities)
        for seed in range(num_seeds)
    ]


def first_states(
    config: base.Config,
    dataset: data.Dataset,
    sparsities: Sequence[float],
    num_seeds: int,
    initial: str,
) -> tuple[optax.Params, optax.OptState]:
    """Return parameters and optimizer states, [sparsities, seeds, ...] each."""

    def first_state(sparsity, seed):
        weights_key, masks_key, redraw_key = jax.random.split(jax.random.key(seed), 3)
        sparse = dataclasses.replace(config.sparse, sparsity=sparsity)
        tx = build.optimizer(dataclasses.replace(config, sparse=sparse), key=masks_key)
        model = build.model(config.model, dataset, key=weights_key)
        params = nnx.as_pure(nnx.state(model, nnx.Param))
        opt_state = tx.init(params)
        if sparse.method != "dense" and initial == "dense":
            params = sparse_optax.apply_masks(params, opt_state)
        elif sparse.method != "dense":
            variant = "std" if initial == "std" else "variance"
            params = sparse_optax.reinitialize(
                params, opt_state, key=redraw_key, variant=variant
            )
        return params, opt_state

    @jax.jit
    def init(every_seed):
        states = [
            jax.vmap(functools.partial(first_state, sparsity))(every_seed)
            for sparsity in sparsities
        ]
        return jax.tree.map(lambda *x: jnp.stack(x), *states)

    return init(jnp.arange(num_seeds))


def _structure(masks: Sequence[np.ndarray], dataset: data.Dataset) -> dict[str, Any]:
    """Say what the masks [in, out] of an MLP connect, in the order of its layers."""
    deviation = dataset.train.images.reshape(len(dataset.train), -1).std(axis=0)
    varied = deviation > np.median(deviation)
    return {
        "active": sum(int(mask.sum()) for mask in masks),
        "size": sum(mask.size for mask in masks),
        "pixels": int(masks[0].any(axis=1).sum()),
        "share_on_varied_pixels": float(masks[0][varied].sum() / masks[0].sum()),
        "neurons": [
            int((left.any(axis=0) & right.any(axis=1)).sum())
            for left, right in zip(masks[:-1], masks[1:], strict=True)
        ],
    }
