"""LeNet-300-100 with RigL at 98 % sparsity on Fashion-MNIST.

    SPARSEJAX_DATA_DIR=DATA python experiments/classify.py \
        --config=configs/fashion_mnist_rigl.py --workdir=runs/fashion_mnist_rigl

Expected: 88.0 % of the 10,000 test images in 30 s on 2 CPU cores, 10 s of it reading
and compiling. With `--config.sparse.method=static` 86.7 %, `set` 87.7 %, `magnitude`
89.4 %, `dense` 90.1 % (one seed each).
"""

from configs import base


def get_config(arg=None):
    del arg
    return base.Config(
        data=base.Data(name="fashion_mnist"),
        sparse=base.Sparse(sparsity=0.98),
        num_steps=10_000,
        log_every=100,
        eval_every=1000,
        checkpoint_every=1000,
    )
