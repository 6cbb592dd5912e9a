"""A dense MLP on scikit-learn's digits, to compare sparse ones with.

    python experiments/classify.py --config=configs/digits_dense.py \
        --workdir=runs/digits_dense

Expected: 99.2 % of the 360 test images (seeds 0 and 1) in 6 s on 2 CPU cores,
compilation included.
"""

from configs import base


def get_config(arg=None):
    del arg
    return base.Config(sparse=base.Sparse(method="dense", sparsity=0.0))
