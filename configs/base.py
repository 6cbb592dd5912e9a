"""What an experiment is made of, with the defaults that the configs here share."""

import dataclasses

# Marks what may be another when a run goes on: it depends on the machine, or is only
# how much is asked for.
MAY_CHANGE = {"may_change": True}


@dataclasses.dataclass
class Data:
    """The images, and what training does to them before the network sees them."""

    # "digits", or the name of a tfds image dataset.
    name: str = "digits"
    # Folder of the tfds datasets; empty: the variable SPARSEJAX_DATA_DIR.
    data_dir: str = dataclasses.field(default="", metadata=MAY_CHANGE)
    # tfds splits; a part of one is "train[:45000]".
    train_split: str = "train"
    test_split: str = "test"
    # False: all images in memory, decoded once; they must be of one size. True: each
    # is decoded when it is needed, by so many worker processes (0: up to 16 threads).
    stream: bool = False
    workers: int = dataclasses.field(default=0, metadata=MAY_CHANGE)
    # Height and width that the network sees, of streamed images; 0: as stored. Of the
    # shorter side of test images 7/8 remain, in their middle.
    image_size: int = 0
    # Of training images: "none", "crop" (pad by `padding` zeros, crop to the former
    # size, flip every second image), "crop_reflect" (pad by reflection), or
    # "resized_crop" (a random part, resized to the whole, and the flip).
    augment: str = "none"
    padding: int = 4
    # RandAugment: so many operations an image (0: none), each of this magnitude.
    rand_augment: int = 0
    magnitude: int = 9
    # Parameters of the Beta distributions of mixup and cutmix, 0: none. Where both are
    # set, each pair of images takes one of the two.
    mixup: float = 0.0
    cutmix: float = 0.0
    # Of the channels, for pixels in [0, 1]; empty: of the training images in memory,
    # ImageNet's for streamed ones. (0,) and (1,) leave the pixels in [0, 1].
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclasses.dataclass
class Model:
    """The network; sizes of its input and output come from the dataset.

    A field that a network has no use for is left out.
    """

    # What `sparsejax.models` has under this name: "mlp", "resnet_cifar", "resnet",
    # "wide_resnet", "vgg_cifar" or "vit".
    name: str = "mlp"
    # mlp: sizes of the hidden layers.
    widths: tuple[int, ...] = (300, 100)
    # Layers as the name of the network counts them, blocks of a vit.
    depth: int = 20
    # Channels of the first stage; wide_resnet: the factor on them; vit: of a token.
    width: int = 16
    # resnet: "imagenet" or "cifar".
    stem: str = "imagenet"
    # resnet_cifar: strides of the first layer; "projection" or "padding".
    stem_strides: int = 1
    shortcut: str = "projection"
    # wide_resnet, vit.
    dropout_rate: float = 0.0
    # vit.
    patch_size: int = 16
    num_heads: int = 12
    mlp_width: int = 3072


@dataclasses.dataclass
class Optimizer:
    """The optimizer of the weights, and its learning rate after a linear warm-up."""

    # "sgd" (with Nesterov momentum) or "adamw".
    name: str = "sgd"
    learning_rate: float = 0.1
    warmup_steps: int = 100
    # "cosine": half a cosine down to 0. "steps": times `factor` at each step of `at`.
    decay: str = "cosine"
    at: tuple[int, ...] = ()
    factor: float = 0.1
    momentum: float = 0.9
    # "sgd" adds it to the gradient.
    weight_decay: float = 5e-4
    # What decays: "kernels", "all", or all parameters "but_norms".
    decayed: str = "kernels"
    # Gradients of a larger global norm are scaled down to it; 0: never.
    clip_norm: float = 0.0


@dataclasses.dataclass
class Sparse:
    """The algorithm around the optimizer.

    A field that a method has no use for (`drop_fraction` under "static") is left
    out, so that one flag, `--config.sparse.method=static`, makes the comparison.
    """

    # "dense", or a factory of `sparsejax.sparse_optax`: "static", "set", "rigl",
    # "srigl", "chase", "magnitude".
    method: str = "rigl"
    sparsity: float = 0.9
    # "erk" or "uniform".
    distribution: str = "erk"
    drop_fraction: float = 0.3
    start_at: int = 0
    update_every: int = 100
    # srigl: the part of a neuron's fan-in that must be salient; 0 ablates none.
    gamma: float = 0.3
    # chase: the part of the channels that goes, and the steps between removals.
    channel_sparsity: float = 0.3
    remove_every: int = 100
    # chase: a group keeps this part of the channels that it would keep if all lost
    # alike; removal ends after this part of the steps in which masks change; and then
    # this part of the weights is still held beyond the budget.
    min_channels: float = 0.2
    stop_removal_fraction: float = 0.8
    soft_end: float = 0.0
    # rigl, srigl: weights grow by the sum of the gradients of so many steps.
    accumulate: int = 1
    # Masks stay as they are after this part of the training.
    stop_fraction: float = 0.75
    # What active weights start from: "dense", as the layer draws them; or drawn for
    # the fan-in k of their neuron, of "variance" 2/k or of deviation ("std") 2/k.
    initial: str = "dense"


@dataclasses.dataclass
class Config:
    """One run: the same fields give the same run."""

    data: Data = dataclasses.field(default_factory=Data)
    model: Model = dataclasses.field(default_factory=Model)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    sparse: Sparse = dataclasses.field(default_factory=Sparse)
    # Of the weights, the masks and the order of the data.
    seed: int = 0
    num_steps: int = 1000
    # Of all devices and processes together.
    batch_size: int = 128
    eval_batch_size: int = 1000
    # Parts of a batch whose gradients are computed one after the other.
    microbatches: int = 1
    # The share of a label that is spread over all classes.
    label_smoothing: float = 0.0
    # Of the average of the weights, which is then tested in their place; 0: none.
    ema_decay: float = 0.0
    # Of activations, "float32" or "bfloat16"; weights are float32.
    dtype: str = "float32"
    # Devices that share each large array; the others have copies.
    fsdp: int = dataclasses.field(default=1, metadata=MAY_CHANGE)
    # In steps. A checkpoint is written where a line is logged.
    log_every: int = 50
    eval_every: int = 250
    checkpoint_every: int = 250
    keep_checkpoints: int = 2


@dataclasses.dataclass
class ToST(Config):
    """A run with the tricks of `experiments/tost.py`, of which smooth labels are one.

    Their share that all other classes have is `label_smoothing`, as in the paper.
    """

    label_smoothing: float = 0.1
    # Ghost neurons, "swish" or "mish".
    neurons: str = "swish"
    # The part of the steps in which there are ghosts.
    ghost_fraction: float = 90 / 182
    # Of the rescaled initialisation, and the images in each of its batches.
    rescale_iterations: int = 180
    rescale_batch_size: int = 128


@dataclasses.dataclass
class Lottery(Config):
    """Rounds of iterative magnitude pruning, and what their masks are turned into."""

    # Prunings, each of this part of the weights that are left.
    rounds: int = dataclasses.field(default=10, metadata=MAY_CHANGE)
    rate: float = 0.2
    # Networks go back to where training was after this part of the steps.
    rewind_fraction: float = 8 / 160
    # refill+: the part of the other channels that is kept too.
    extra: float = 0.2
    # regroup: groups of rows in each layer.
    groups: int = 8
