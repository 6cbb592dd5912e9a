"""Train an image classifier, sparse or dense, from a config.

    python experiments/classify.py --config=configs/digits_rigl.py --workdir=DIR

Any field of the config can be set on the command line, as in
`--config.sparse.sparsity=0.98`. The same command goes on with a run that was stopped.
"""

import pathlib
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

# A script finds its own folder first; the modules are named from the repository root.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import train  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file("config", help_string="File of the config.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the other hosts of this run, as on a TPU pod."
)
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"These arguments are not flags: {argv[1:]}")
    if _DISTRIBUTED.value:
        jax.distributed.initialize()
    logging.set_verbosity(logging.WARNING)
    record = train.train_and_evaluate(_CONFIG.value, _WORKDIR.value)
    print(
        f"step {record['step']}: test accuracy {record['test/accuracy']:.2%} "
        f"at a sparsity of {record['sparsity']:.2%}"
    )


if __name__ == "__main__":
    app.run(main)
