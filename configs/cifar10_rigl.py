"""ResNet-8 with RigL at 90 % sparsity on CIFAR-10, short enough for a CPU.

    SPARSEJAX_DATA_DIR=DATA python experiments/classify.py \
        --config=configs/cifar10_rigl.py --workdir=runs/cifar10_rigl

Expected: 65 % of the 10,000 test images in 8 minutes on 2 CPU cores, with 7,745 of
77,360 weights after 5 epochs (one seed). An accelerator has time for more:
`--config.model.depth=20 --config.num_steps=60000`.
"""

from configs import base


def get_config(arg=None):
    del arg
    return base.Config(
        data=base.Data(name="cifar10", augment="crop"),
        model=base.Model(name="resnet_cifar", depth=8),
        sparse=base.Sparse(sparsity=0.9),
        num_steps=2000,
        eval_every=500,
        checkpoint_every=250,
    )
