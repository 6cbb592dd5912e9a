"""Compare structured dynamic sparse training on real images, as trained and compacted.

    SPARSEJAX_DATA_DIR=DATA python experiments/structured.py \
        --config=configs/fashion_mnist_resnet.py --workdir=runs/fashion_mnist_resnet \
        --out=results/fashion_mnist_resnet

The config is the recipe; each of `--methods` is trained at each of `--sparsities`,
chase at the first of them, under the first `--seeds` whole numbers. srigl is trained
without ablation (gamma 0) and with the paper's (0.3), chase with channel sparsities of
0, 0.3 and 0.5. Nothing is tuned for a method or on the test set.

Per seed all methods see the same batches, and static, rigl and chase start from the
same mask. Weights under it are drawn for their own fan-in. The accuracy is that of the
last step.

Each run is written into the workdir when it is done, and the same command goes on with
what is missing. `--shard=0/2` and `--shard=1/2` train half of the runs each, side by
side, each behind `taskset -c` of its own core: the last bits depend on the number of
threads. Without it the networks are compacted and timed in the end, and what came of
them is written: tables (OUT.md; what it says under "Reading" is kept), each run
(OUT.json) and a picture (OUT.png). 48 runs take an hour on 2 CPU cores, the report 6
minutes.
"""

import pathlib
import sys

from absl import app, flags

# A script finds its own folder first; the modules are named from the repository root.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import (  # noqa: E402
    data,
    kept_flags,
    kept_runs,
    structured_report,
    structured_runs,
)
from experiments.structured_measure import measure  # noqa: E402

_METHODS = flags.DEFINE_list(
    "methods", list(structured_runs.METHODS), "What to compare."
)
_SPARSITIES = flags.DEFINE_list("sparsities", ["0.9", "0.95", "0.99"], "Of the runs.")
_SECONDS = flags.DEFINE_float("seconds", 0.6, "Of timing a network at a batch size.")
flags.adopt_module_key_flags(kept_flags)


def main(argv: list[str]) -> None:
    kept_flags.check_no_others(argv)
    config = kept_flags.CONFIG.value
    dataset = data.load(config.data)
    compared = structured_runs.settings(
        config.sparse, _METHODS.value, [float(value) for value in _SPARSITIES.value]
    )
    runs = [
        (sparse, seed) for seed in range(kept_flags.SEEDS.value) for sparse in compared
    ]
    if kept_flags.SHARD.value:
        runs = kept_runs.part(runs, kept_flags.SHARD.value)
    workdir = kept_flags.WORKDIR.value
    structured_runs.train_missing(workdir, config, dataset, runs)
    if not kept_flags.SHARD.value:
        structured_report.write(
            pathlib.Path(kept_flags.OUT.value),
            config,
            measure(workdir, config, dataset, runs, _SECONDS.value),
            command=kept_flags.command(),
        )


if __name__ == "__main__":
    app.run(main)
