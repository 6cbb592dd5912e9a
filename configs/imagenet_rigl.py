"""RigL, ResNet-50 on ImageNet (Evci et al. 2020, arXiv:1911.11134).

    python experiments/imagenet.py --config=configs/imagenet_rigl.py \
        --workdir=DIR --config.data.data_dir=DATA --distributed

The paper has 75.1 % at 80 % sparsity and 73.0 % at 90
(`--config.sparse.sparsity=0.9`). For a slice of a TPU pod: 102 epochs of batch 4096.
"""

from configs import base, recipes

_BATCH = 4096


def get_config(arg=None):
    config = recipes.imagenet(
        model=base.Model(name="resnet", depth=50, width=64),
        optimizer=base.Optimizer(
            learning_rate=1.6,
            warmup_steps=recipes.steps_at(_BATCH, 5)[0],
            decay="steps",
            at=recipes.steps_at(_BATCH, 30, 70, 90),
            weight_decay=1e-4,
            decayed="but_norms",
        ),
        sparse=base.Sparse(method="rigl", sparsity=0.8, stop_fraction=25 / 32),
        num_steps=32_000,
        batch_size=_BATCH,
    )
    return recipes.variant(config, arg, depth=18, width=4)
