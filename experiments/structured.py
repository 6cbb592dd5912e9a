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
import shlex
import sys

from absl import app, flags
from ml_collections import config_flags

# A script finds its own folder first; the modules are named from the repository root.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import (  # noqa: E402
    data,
    kept_runs,
    structured_report,
    structured_runs,
)
from experiments.structured_measure import measure  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file("config", help_string="File of the recipe.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs.", required=True)
_OUT = flags.DEFINE_string("out", None, "The results' path, no suffix.", required=True)
_METHODS = flags.DEFINE_list(
    "methods", list(structured_runs.METHODS), "What to compare."
)
_SPARSITIES = flags.DEFINE_list("sparsities", ["0.9", "0.95", "0.99"], "Of the runs.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds.", lower_bound=2)
_SHARD = flags.DEFINE_string("shard", None, "I/N: train only this part of the runs.")
_SECONDS = flags.DEFINE_float("seconds", 0.6, "Of timing a network at a batch size.")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"These arguments are not flags: {argv[1:]}")
    config = _CONFIG.value
    dataset = data.load(config.data)
    compared = structured_runs.settings(
        config.sparse, _METHODS.value, [float(value) for value in _SPARSITIES.value]
    )
    runs = [(sparse, seed) for seed in range(_SEEDS.value) for sparse in compared]
    if _SHARD.value:
        runs = kept_runs.part(runs, _SHARD.value)
        structured_runs.train_missing(_WORKDIR.value, config, dataset, runs)
        return
    structured_runs.train_missing(_WORKDIR.value, config, dataset, runs)
    structured_report.write(
        pathlib.Path(_OUT.value),
        config,
        measure(_WORKDIR.value, config, dataset, runs, _SECONDS.value),
        command=shlex.join(["python", "experiments/structured.py", *sys.argv[1:]]),
    )


if __name__ == "__main__":
    app.run(main)
