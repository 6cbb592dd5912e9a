"""Lottery tickets with structure, VGG-16 on CIFAR-10 (arXiv:2202.04736).

    SPARSEJAX_DATA_DIR=DATA python experiments/lottery.py \
        --config=configs/cifar10_lottery_vgg.py --workdir=runs/cifar10_lottery_vgg \
        --out=results/cifar10_lottery_vgg

All but the network and its weight decay is as in `cifar10_lottery`. The authors have
60 % and 80 % for the sparsest refilled and regrouped tickets that win.
"""

import dataclasses

from configs import base, cifar10_lottery, recipes


def get_config(arg=None):
    config = cifar10_lottery.get_config()
    config = dataclasses.replace(
        config,
        model=base.Model(name="vgg_cifar", depth=16),
        optimizer=dataclasses.replace(config.optimizer, weight_decay=2e-4),
    )
    return recipes.variant(config, arg, depth=11)
