"""Compare sparse-training methods over seeds, by one recipe, with 95 % intervals.

    SPARSEJAX_DATA_DIR=DATA python experiments/compare.py \
        --config=configs/fashion_mnist_rigl.py --out=results/fashion_mnist_lenet

The config is the recipe; its method, sparsity and seed are replaced by each of
`--methods`, `--sparsities` and the first `--seeds` whole numbers. Nothing is tuned for
a method or on the test set: optimizer, ERK, drop fraction and intervals are what RigL
and its successors were published with on CIFAR-10 (Nesterov SGD at 0.1, weight decay
5e-4, 30 % dropped every 100 steps until 75 % of the training), with a cosine decay and
the 21 epochs that are enough for a small network.

Per seed all methods see the same first weights and batches, and all sparse ones but
magnitude pruning, which starts dense, the same first mask. Weights under it are drawn
for their own fan-in: at 99 % sparsity a neuron has about six inputs, a dense
initializer starts with vanishing activations, and a method could look good only because
it leaves that start behind. `--initial=dense` is for the comparison with that start.
The accuracy is that of the last step.

All seeds and sparsities of a method train at once, in one compiled program. Writes a
table (OUT.md; what it says under "Reading" is kept) and each run (OUT.json). All five
methods at two sparsities take a quarter of an hour on 2 CPU cores.
"""

import dataclasses
import pathlib
import shlex
import sys

from absl import app, flags
from ml_collections import config_flags

# A script finds its own folder first; the modules are named from the repository root.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import comparison, comparison_report, data  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file("config", help_string="File of the recipe.")
_OUT = flags.DEFINE_string("out", None, "The results' path, no suffix.", required=True)
_METHODS = flags.DEFINE_list(
    "methods", list(comparison_report.METHODS), "What to compare."
)
_SPARSITIES = flags.DEFINE_list("sparsities", ["0.98", "0.99"], "For each method.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Number of seeds.", lower_bound=2)
_INITIAL = flags.DEFINE_enum(
    "initial",
    "variance",
    ["variance", "std", "dense"],
    "Weights under a first mask: as in sparse_optax.reinitialize, or a dense draw.",
)
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"These arguments are not flags: {argv[1:]}")
    config = _CONFIG.value
    dataset = data.load(config.data)
    sparsities = [float(sparsity) for sparsity in _SPARSITIES.value]
    runs = []
    for method in _METHODS.value:
        sparse = dataclasses.replace(config.sparse, method=method)
        runs += comparison.train(
            dataclasses.replace(config, sparse=sparse),
            dataset,
            sparsities if method != "dense" else [0.0],
            _SEEDS.value,
            _INITIAL.value,
        )
    comparison_report.write(
        pathlib.Path(_OUT.value),
        config,
        runs,
        command=shlex.join(["python", "experiments/compare.py", *sys.argv[1:]]),
        initial=_INITIAL.value,
    )


if __name__ == "__main__":
    app.run(main)
