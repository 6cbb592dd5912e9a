"""What an experiment is made of, with the defaults that the configs here share."""

import dataclasses


@dataclasses.dataclass
class Model:
    """The network; sizes of its input and output come from the dataset."""

    # "mlp" or "resnet".
    name: str = "mlp"
    # mlp: sizes of the hidden layers.
    widths: tuple[int, ...] = (300, 100)
    # resnet: 6n+2 layers, channels of the first stage, "projection" or "padding".
    depth: int = 20
    width: int = 16
    shortcut: str = "projection"


@dataclasses.dataclass
class Optimizer:
    """The optimizer of the weights, with a warm-up and a cosine decay to 0."""

    # "sgd" (with Nesterov momentum) or "adamw".
    name: str = "sgd"
    learning_rate: float = 0.1
    warmup_steps: int = 100
    momentum: float = 0.9
    # Of kernels alone; "sgd" adds it to the gradient.
    weight_decay: float = 5e-4


@dataclasses.dataclass
class Sparse:
    """The algorithm around the optimizer.

    A field that a method has no use for (`drop_fraction` under "static") is left
    out, so that one flag, `--config.sparse.method=static`, makes the comparison.
    """

    # "dense", or a factory of `sparsejax.sparse_optax`: "static", "set", "rigl",
    # "magnitude".
    method: str = "rigl"
    sparsity: float = 0.9
    # "erk" or "uniform".
    distribution: str = "erk"
    drop_fraction: float = 0.3
    start_at: int = 0
    update_every: int = 100
    # Masks stay as they are after this part of the training.
    stop_fraction: float = 0.75


@dataclasses.dataclass
class Config:
    """One run: the same fields give the same run."""

    # "digits" or the name of a tfds image dataset.
    dataset: str = "digits"
    # Folder of the tfds datasets; empty: the variable SPARSEJAX_DATA_DIR.
    data_dir: str = ""
    # Pad-crop-flip the training images.
    augment: bool = False
    model: Model = dataclasses.field(default_factory=Model)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    sparse: Sparse = dataclasses.field(default_factory=Sparse)
    # Of the weights, the masks and the order of the data.
    seed: int = 0
    num_steps: int = 1000
    # Of all devices and processes together.
    batch_size: int = 128
    eval_batch_size: int = 1000
    # In steps. A checkpoint is written where a line is logged.
    log_every: int = 50
    eval_every: int = 250
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
