"""Chase, VGG-19 on CIFAR-100 (Yin et al. 2023, arXiv:2305.19454).

    SPARSEJAX_DATA_DIR=DATA python experiments/classify.py \
        --config=configs/cifar100_chase_vgg.py --workdir=runs/cifar100_chase_vgg

Half of the channels go, in eight events. All but the network, and when and to what
floor channels go, is as in `cifar100_chase`.
"""

import dataclasses

from configs import base, cifar100_chase, recipes


def get_config(arg=None):
    config = cifar100_chase.get_config()
    config = dataclasses.replace(
        config,
        model=base.Model(name="vgg_cifar", depth=19),
        sparse=dataclasses.replace(config.sparse, min_channels=0.2, remove_every=8000),
    )
    return recipes.variant(config, arg, depth=11)
