"""SRigL, ResNet-50 on ImageNet (Lasby et al. 2024, arXiv:2305.02299).

    python experiments/imagenet.py --config=configs/imagenet_srigl.py \
        --workdir=DIR --config.data.data_dir=DATA --distributed

The paper has 75.01 % at 80 % sparsity, 72.71 at 90, 69.18 at 95 and 51.55 at 99, one
seed each; 103 epochs of batch 512, for 4 to 8 accelerators. Weights grow by the
gradients of eight steps, 4096 images.
"""

from configs import base, recipes

_BATCH = 512


def get_config(arg=None):
    config = recipes.imagenet(
        model=base.Model(name="resnet", depth=50, width=64),
        optimizer=base.Optimizer(
            learning_rate=0.2,
            warmup_steps=recipes.steps_at(_BATCH, 5)[0],
            decay="steps",
            at=recipes.steps_at(_BATCH, 30, 70, 90),
            weight_decay=1e-4,
            decayed="all",
        ),
        sparse=base.Sparse(
            method="srigl",
            sparsity=0.9,
            gamma=0.3,
            update_every=800,
            accumulate=8,
            initial="std",
        ),
        num_steps=256_000,
        batch_size=_BATCH,
    )
    return recipes.variant(config, arg, depth=18, width=4)
