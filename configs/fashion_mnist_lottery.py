"""Lottery tickets with structure, a wide ResNet-8 on Fashion-MNIST.

    SPARSEJAX_DATA_DIR=DATA python experiments/lottery.py \
        --config=configs/fashion_mnist_lottery.py --workdir=runs/fashion_mnist_lottery \
        --out=results/fashion_mnist_lottery

A third of the images' size and 600 steps are what 246 runs can have in three hours of
a CPU core. A pruning takes 36 % of the weights, as much as two of the paper's, so that
five rounds come to the density of its ten; three more go on to 2.8 %. Layers have half
the channels of those of a ResNet-18, and half as many groups of rows, which are thus as
large as the paper's: 32 and 64 rows, in 3x3 convolutions with 91 % of the weights.
"""

from configs import base


def get_config(arg=None):
    del arg
    return base.Lottery(
        data=base.Data(name="fashion_mnist"),
        model=base.Model(name="resnet_cifar", depth=8, width=64, stem_strides=3),
        optimizer=base.Optimizer(warmup_steps=60),
        sparse=base.Sparse(method="static"),
        num_steps=600,
        batch_size=32,
        rounds=8,
        rate=0.36,
        rewind_fraction=0.1,
        groups=4,
    )
