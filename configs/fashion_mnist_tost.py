"""ToST, ResNet-8 on Fashion-MNIST at half size.

    SPARSEJAX_DATA_DIR=DATA python experiments/tost.py \
        --config=configs/fashion_mnist_tost.py --workdir=runs/fashion_mnist_tost \
        --out=results/fashion_mnist_tost

Width and length are what 273 runs can have in an hour on 2 CPU cores. Learning rate
and ghosts fall after the parts of the training after which they do in `cifar100_tost`.
"""

from configs import base


def get_config(arg=None):
    del arg
    return base.ToST(
        data=base.Data(name="fashion_mnist"),
        model=base.Model(name="resnet_cifar", depth=8, width=12, stem_strides=2),
        optimizer=base.Optimizer(
            weight_decay=2e-4,
            warmup_steps=0,
            decay="steps",
            at=(247, 371),
            decayed="all",
        ),
        sparse=base.Sparse(method="static"),
        num_steps=500,
        batch_size=64,
        rescale_batch_size=32,
    )
