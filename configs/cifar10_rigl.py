"""ResNet-8 with RigL at 90 % sparsity on CIFAR-10: what a laptop does over a coffee.

    SPARSEJAX_DATA_DIR=DATA python experiments/classify.py \
        --config=configs/cifar10_rigl.py --workdir=runs/cifar10_rigl

For the network of the papers add `--config.model.depth=20` and an accelerator, with
`--config.num_steps=60000 --config.optimizer.warmup_steps=1000`.
"""

from configs import base


def get_config(arg=None):
    del arg
    return base.Config(
        dataset="cifar10",
        augment=True,
        model=base.Model(name="resnet", depth=8),
        sparse=base.Sparse(sparsity=0.9),
        num_steps=2000,
        eval_every=500,
        checkpoint_every=250,
    )
