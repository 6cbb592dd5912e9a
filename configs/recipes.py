"""How the papers train, apart from their algorithms; and short runs to try it out."""

import dataclasses

from configs import base

# Steps of an epoch of ImageNet's 1,281,167 images, by batch size.
IMAGENET_EPOCH = {512: 2502, 4096: 313}


def cifar(data: base.Data, optimizer: base.Optimizer, **fields) -> base.Config:
    """SGD with a falling learning rate and no warm-up, on 32x32 images."""
    return base.Config(
        data=dataclasses.replace(data, stream=False),
        optimizer=dataclasses.replace(
            optimizer, warmup_steps=0, decay="steps", decayed="all"
        ),
        log_every=100,
        eval_every=1000,
        checkpoint_every=1000,
        **fields,
    )


def imagenet(data: base.Data | None = None, **fields) -> base.Config:
    """Crops of 224 pixels, bfloat16, and smoothed labels."""
    data = data or base.Data()
    return base.Config(
        data=dataclasses.replace(
            data,
            name="imagenet2012",
            test_split="validation",
            stream=True,
            workers=16,
            image_size=224,
            augment="resized_crop",
        ),
        eval_batch_size=2048,
        dtype="bfloat16",
        log_every=100,
        eval_every=5000,
        checkpoint_every=1000,
        **{"label_smoothing": 0.1, **fields},
    )


def steps_at(batch_size: int, *epochs: int) -> tuple[int, ...]:
    """Return the steps at which epochs of ImageNet begin."""
    return tuple(epoch * IMAGENET_EPOCH[batch_size] for epoch in epochs)


def variant(config: base.Config, arg: str | None, **model) -> base.Config:
    """Return what `--config=FILE.py:ARG` asks for.

    Args:
      config: the experiment.
      arg: None for the experiment; "smoke" for 8 steps in which everything happens
        that happens in it: masks change, channels go, the average follows.
      **model: fields of the small network for "smoke".

    Raises:
      ValueError: where `arg` is neither.
    """
    if not arg:
        return config
    if arg != "smoke":
        raise ValueError(f"The only variant of a config is 'smoke', got {arg!r}.")
    data, sparse = config.data, config.sparse
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            data,
            train_split=_first(data.train_split, 64),
            test_split=_first(data.test_split, 40),
            image_size=min(data.image_size, 32),
            workers=0,
        ),
        model=dataclasses.replace(config.model, **model),
        optimizer=dataclasses.replace(
            config.optimizer, warmup_steps=min(config.optimizer.warmup_steps, 2)
        ),
        sparse=dataclasses.replace(
            sparse,
            sparsity=0.5,
            update_every=4,
            remove_every=4,
            accumulate=min(sparse.accumulate, 2),
        ),
        num_steps=8,
        batch_size=16,
        eval_batch_size=16,
        log_every=2,
        eval_every=4,
        checkpoint_every=4,
    )


def _first(split: str, count: int) -> str:
    """Name the first examples of a split, whatever part of it was named."""
    return f"{split.split('[')[0]}[:{count}]"
