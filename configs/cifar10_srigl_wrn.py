"""SRigL, WRN-22-2 on CIFAR-10 (Lasby et al. 2024, arXiv:2305.02299).

    SPARSEJAX_DATA_DIR=DATA python experiments/classify.py \
        --config=configs/cifar10_srigl_wrn.py --workdir=runs/cifar10_srigl_wrn

The paper has 93.3 % at 90 % sparsity, 91.8 +- 0.2 at 95 and 82.7 +- 0.9 at 99, means
over five seeds of the best epoch. All but the network is as in `cifar10_srigl`.
"""

import dataclasses

from configs import base, cifar10_srigl, recipes


def get_config(arg=None):
    model = base.Model(name="wide_resnet", depth=22, width=2, dropout_rate=0.3)
    config = dataclasses.replace(cifar10_srigl.get_config(), model=model)
    return recipes.variant(config, arg, depth=10, width=1)
