"""Find structural lottery tickets, and test which of them win.

    SPARSEJAX_DATA_DIR=DATA python experiments/lottery.py \
        --config=configs/fashion_mnist_lottery.py --workdir=runs/fashion_mnist_lottery \
        --out=results/fashion_mnist_lottery

Under each of the first `--seeds` whole numbers a dense network is trained, pruned and
rewound, round after round. The masks of each round are turned into those of each of
`--branches` (`lottery_masks.BRANCHES`), under which the rewound weights, or with
"-reinit" others, are trained for as long. To regroup, install `sparsejax[regroup]`.
Nothing is tuned for a branch or on the test set.

Each run is written into the workdir when it is done, and the same command goes on with
what is missing. `--shard=0/2` and `--shard=1/2` train about half of the runs each, side
by side, each behind `taskset -c` of its own core: the last bits depend on the number of
threads. A shard trains the rounds of every second seed first; one that comes to need a
round that the other has not trained yet says so, and is started again later. Without
`--shard` what is missing is trained, the tickets are executed and timed, and what came
of them is written: tables (OUT.md; what it says under "Reading" is kept), each run
(OUT.json) and a picture (OUT.png). What was timed is kept in WORKDIR/measured.
"""

import pathlib
import sys

from absl import app, flags, logging

# A script finds its own folder first; the modules are named from the repository root.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import (  # noqa: E402
    data,
    kept_flags,
    lottery_masks,
    lottery_report,
    lottery_runs,
)
from experiments.lottery_measure import measure  # noqa: E402

_BRANCHES = flags.DEFINE_list("branches", list(lottery_masks.COMPARED), "Of a round.")
_SECONDS = flags.DEFINE_float("seconds", 2.0, "Of timing a ticket.")
flags.adopt_module_key_flags(kept_flags)


def main(argv: list[str]) -> None:
    kept_flags.check_no_others(argv)
    logging.set_verbosity(logging.WARNING)  # Orbax tells every file it writes.
    config = kept_flags.CONFIG.value
    dataset = data.load(config.data)
    runs = lottery_runs.runs(_BRANCHES.value, config.rounds, kept_flags.SEEDS.value)
    if kept_flags.SHARD.value:
        runs = lottery_runs.part(runs, kept_flags.SHARD.value)
    workdir = kept_flags.WORKDIR.value
    lottery_runs.train_missing(workdir, config, dataset, runs)
    if not kept_flags.SHARD.value:
        lottery_report.write(
            pathlib.Path(kept_flags.OUT.value),
            config,
            measure(workdir, config, dataset, runs, _SECONDS.value),
            command=kept_flags.command(),
        )


if __name__ == "__main__":
    app.run(main)
