"""Chase, ResNet-50 on CIFAR-100 (Yin et al. 2023, arXiv:2305.19454).

    SPARSEJAX_DATA_DIR=DATA python experiments/classify.py \
        --config=configs/cifar100_chase.py --workdir=runs/cifar100_chase

Half of the channels inside the blocks go. The authors' code has no accuracies for
CIFAR: compare with `--config.sparse.method=dense` and, at the same sparsity, with
`--config.sparse.channel_sparsity=0`. The head has a bias here, and none there.
"""

from configs import base, recipes


def get_config(arg=None):
    config = recipes.cifar(
        base.Data(
            name="cifar100",
            augment="crop",
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
        ),
        base.Optimizer(learning_rate=0.1, weight_decay=5e-4, at=(40_000, 60_000)),
        model=base.Model(name="resnet", depth=50, width=64, stem="cifar"),
        sparse=base.Sparse(
            method="chase",
            sparsity=0.9,
            channel_sparsity=0.5,
            min_channels=0.5,
            drop_fraction=0.5,
            update_every=1000,
            remove_every=1000,
            stop_removal_fraction=130 / 160,
            stop_fraction=1.0,
        ),
        num_steps=80_000,
        batch_size=100,
    )
    return recipes.variant(config, arg, depth=18, width=4)
