"""Train an image classifier, sparse or dense, from a config.

    python experiments/classify.py --config=configs/digits_rigl.py --workdir=DIR

Any field of the config can be set on the command line, as in
`--config.sparse.sparsity=0.98`, and `--config=FILE.py:smoke` takes the few small steps
of a config that show that it works. The same command goes on with a run that was
stopped. After SIGTERM the run saves itself and exits with the code 75, for which a
scheduler may start the command again.
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

# A script finds its own folder first; the modules are named from the repository root.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import mesh, train  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file("config", help_string="File of the config.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_RESUME_FROM = flags.DEFINE_integer("resume_from", None, "Step of a checkpoint.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the other processes of this run, as on a TPU pod."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "Host and port of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is.")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"These arguments are not flags: {argv[1:]}")
    if _DISTRIBUTED.value:
        mesh.join_processes(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    logging.set_verbosity(logging.WARNING)
    record = train.train_and_evaluate(
        _CONFIG.value, _WORKDIR.value, resume_from=_RESUME_FROM.value
    )
    print(
        f"step {record['step']}: test accuracy {record['test/accuracy']:.2%} "
        f"at a sparsity of {record['sparsity']:.2%}"
    )


if __name__ == "__main__":
    app.run(main)
