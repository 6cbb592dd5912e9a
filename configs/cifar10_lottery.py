"""Lottery tickets with structure, ResNet-18 on CIFAR-10 (arXiv:2202.04736).

    SPARSEJAX_DATA_DIR=DATA python experiments/lottery.py \
        --config=configs/cifar10_lottery.py --workdir=runs/cifar10_lottery \
        --out=results/cifar10_lottery

As in Chen et al. 2022, for 160 epochs a run, on accelerators. The authors choose the
epoch that is tested by the last 5,000 training images, here the last step is tested;
their momentum is not Nesterov's. They have 94.48 % and 94.75 % for what regrouping
makes of the first two rounds, 94.14 % to 94.45 % for refilled tickets of the first
four, and 50 % and 78 % for the sparsest refilled and regrouped tickets that win.
"""

from configs import base, recipes

_EPOCH = 352  # steps


def get_config(arg=None):
    config = recipes.cifar(
        base.Data(name="cifar10", train_split="train[:45000]", augment="crop"),
        base.Optimizer(
            learning_rate=0.1, weight_decay=1e-4, at=(80 * _EPOCH, 120 * _EPOCH)
        ),
        model=base.Model(name="resnet", depth=18, width=64, stem="cifar"),
        sparse=base.Sparse(method="static"),
        num_steps=160 * _EPOCH,
        batch_size=128,
    )
    return recipes.variant(base.Lottery(**vars(config)), arg, width=4)
