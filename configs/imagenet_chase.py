"""Chase, ResNet-50 on ImageNet (Yin et al. 2023, arXiv:2305.19454).

    python experiments/imagenet.py --config=configs/imagenet_chase.py \
        --workdir=DIR --config.data.data_dir=DATA --distributed

The paper has 74.03 % at 90 % sparsity and 75.27 % at 80, with 40 % of the channels
inside the blocks gone; 100 epochs of batch 512, for 4 to 8 accelerators.
"""

from configs import base, recipes

_BATCH = 512


def get_config(arg=None):
    config = recipes.imagenet(
        model=base.Model(name="resnet", depth=50, width=64),
        optimizer=base.Optimizer(
            learning_rate=0.512,
            warmup_steps=recipes.steps_at(_BATCH, 8)[0],
            weight_decay=1e-4,
            decayed="but_norms",
        ),
        sparse=base.Sparse(
            method="chase",
            sparsity=0.9,
            channel_sparsity=0.4,
            min_channels=0.2,
            drop_fraction=0.5,
            update_every=1000,
            remove_every=recipes.steps_at(_BATCH, 2)[0],
            stop_removal_fraction=0.8,
            soft_end=0.005,
            stop_fraction=1.0,
        ),
        num_steps=250_200,
        batch_size=_BATCH,
    )
    return recipes.variant(config, arg, depth=18, width=4)
