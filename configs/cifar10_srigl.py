"""SRigL, ResNet-18 on CIFAR-10 (Lasby et al. 2024, arXiv:2305.02299).

    SPARSEJAX_DATA_DIR=DATA python experiments/classify.py \
        --config=configs/cifar10_srigl.py --workdir=runs/cifar10_srigl

The paper has 95.11 % at 90 % sparsity, 94.70 at 95 and 92.79 at 99
(`--config.sparse.sparsity=0.99`), means over five seeds of the best epoch; 250 epochs,
hours on one GPU. Pixels stay in [0, 1] and are not normalized, as in the authors' code.
"""

from configs import base, recipes


def get_config(arg=None):
    config = recipes.cifar(
        base.Data(name="cifar10", augment="crop_reflect", mean=(0.0,), std=(1.0,)),
        base.Optimizer(
            learning_rate=0.1,
            weight_decay=5e-4,
            at=(30_030, 60_060, 90_090),
            factor=0.2,
        ),
        model=base.Model(name="resnet", depth=18, width=64, stem="cifar"),
        sparse=base.Sparse(method="srigl", sparsity=0.9, gamma=0.3, initial="std"),
        num_steps=97_500,
        batch_size=128,
    )
    return recipes.variant(config, arg, width=4)
