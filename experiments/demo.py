"""Train dense and sparse networks on real digits, side by side, and report.

    python experiments/demo.py --workdir=runs/demo

LeNet-300-100 on scikit-learn's digits, dense and by four methods at 95 % sparsity:
`configs/digits_rigl.py` under ten seeds, which `jax.vmap` trains together. Then a
trained network loses three quarters of its neurons, is compacted, trained on, exported
and served by a process without Flax. Prints tables; the folder gets `report.md` with
pictures, `metrics.jsonl`, `config.json`, a checkpoint and two exported networks. A
folder that holds a finished demo is left as it is.

Expected: a minute on 2 CPU cores, half of it compilation.
"""

import pathlib
import sys

from absl import app, flags, logging

# A script finds its own folder first; the modules are named from the repository root.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import demo_run  # noqa: E402

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the demo.", required=True)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"These arguments are not flags: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    demo_run.run(demo_run.Demo(), _WORKDIR.value)


if __name__ == "__main__":
    app.run(main)
