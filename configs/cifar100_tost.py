"""ToST, ResNet-18 on CIFAR-100 (Jaiswal et al. 2022, arXiv:2206.12755).

    SPARSEJAX_DATA_DIR=DATA python experiments/tost.py \
        --config=configs/cifar100_tost.py --workdir=runs/cifar100_tost \
        --out=results/cifar100_tost

182 epochs a run, on accelerators. The authors leave 5,000 of the training images out to
select a checkpoint; here none is selected. Their momentum is not Nesterov's. For all
tricks together they have more than 2 points over SNIP at 95 % on TinyImageNet, and more
than 1.5 over lottery tickets; their code has no script for all.
"""

from configs import base, recipes

_EPOCH = 391  # steps


def get_config(arg=None):
    config = recipes.cifar(
        base.Data(
            name="cifar100",
            augment="crop",
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2023, 0.1994, 0.2010),
        ),
        base.Optimizer(
            learning_rate=0.1, weight_decay=2e-4, at=(90 * _EPOCH, 135 * _EPOCH)
        ),
        model=base.Model(name="resnet", depth=18, width=64, stem="cifar"),
        sparse=base.Sparse(method="static", sparsity=0.9),
        num_steps=182 * _EPOCH,
        batch_size=128,
    )
    config = base.ToST(**(vars(config) | {"label_smoothing": 0.1}))
    return recipes.variant(config, arg, depth=18, width=4)
