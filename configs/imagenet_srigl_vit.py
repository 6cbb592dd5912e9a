"""SRigL, ViT-B/16 on ImageNet (Lasby et al. 2024, arXiv:2305.02299).

    python experiments/imagenet.py --config=configs/imagenet_srigl_vit.py \
        --workdir=DIR --config.data.data_dir=DATA --distributed

The paper has 77.5 % at 80 % sparsity and 76.0 % at 90, one seed each; 150 epochs of
batch 4096. On few devices `--config.microbatches=8` makes the batch in parts, as the
authors did. Here the learning rate reaches 0; there the run ended before.
"""

from configs import base, recipes

_BATCH = 4096


def get_config(arg=None):
    config = recipes.imagenet(
        base.Data(rand_augment=2, magnitude=9, mixup=0.2, cutmix=1.0),
        model=base.Model(name="vit", depth=12, width=768, num_heads=12, mlp_width=3072),
        optimizer=base.Optimizer(
            name="adamw",
            learning_rate=3e-3,
            warmup_steps=recipes.steps_at(_BATCH, 16)[0],
            weight_decay=0.3,
            decayed="all",
            clip_norm=1.0,
        ),
        sparse=base.Sparse(
            method="srigl",
            sparsity=0.9,
            distribution="uniform",
            gamma=0.95,
            initial="std",
        ),
        num_steps=46_918,
        batch_size=_BATCH,
        label_smoothing=0.11,
    )
    small = {"depth": 1, "width": 24, "num_heads": 2, "mlp_width": 48}
    return recipes.variant(config, arg, **small)
