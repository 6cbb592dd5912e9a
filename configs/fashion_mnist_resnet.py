"""ResNet-8 on Fashion-MNIST at half size, in which whole channels can go.

    SPARSEJAX_DATA_DIR=DATA python experiments/structured.py \
        --config=configs/fashion_mnist_resnet.py --workdir=runs/fashion_mnist_resnet \
        --out=results/fashion_mnist_resnet

Width and length are what 48 runs can have in an hour on 2 CPU cores. Expected: 89.6 %
of the test images for the dense network, 87 % at 90 % sparsity.
"""

from configs import base


def get_config(arg=None):
    del arg
    return base.Config(
        data=base.Data(name="fashion_mnist"),
        model=base.Model(name="resnet_cifar", depth=8, width=20, stem_strides=2),
        sparse=base.Sparse(initial="variance", update_every=40, remove_every=40),
        num_steps=1000,
        batch_size=64,
    )
