"""Compare the tricks of ToST, alone and together, under masks of several sources.

    SPARSEJAX_DATA_DIR=DATA python experiments/tost.py \
        --config=configs/fashion_mnist_tost.py --workdir=runs/fashion_mnist_tost \
        --out=results/fashion_mnist_tost

The config is the recipe. Masks of each of `--sources` at each of `--sparsities` are
found on the dense network at its start, by 10 images of each class where a source
looks at images, and trained under with each of `--tricks`, under the first `--seeds`
whole numbers; and so is the dense network, without tricks. Nothing is tuned for a trick
or on the test set.

Per seed all runs see the same first weights and batches, and all tricks the same mask.
The accuracy is that of the last step, in which no network has ghosts any more; the
test's loss has hard labels.

Each run is written into the workdir when it is done, and the same command goes on with
what is missing. `--shard=0/2` and `--shard=1/2` train half of the masks each, side by
side; without it the report is written in the end: tables (OUT.md; what it says under
"Reading" is kept), each run (OUT.json) and a picture (OUT.png).
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
    tost_masks,
    tost_report,
    tost_runs,
)

_SOURCES = flags.DEFINE_list("sources", list(tost_masks.SOURCES), "Of the masks.")
_SPARSITIES = flags.DEFINE_list("sparsities", ["0.9", "0.95", "0.98"], "Of the masks.")
_TRICKS = flags.DEFINE_list("tricks", list(tost_runs.TRICKS), "vanilla: none.")
flags.adopt_module_key_flags(kept_flags)


def main(argv: list[str]) -> None:
    kept_flags.check_no_others(argv)
    config = kept_flags.CONFIG.value
    dataset = data.load(config.data)
    sparsities = [float(value) for value in _SPARSITIES.value]
    cells = tost_runs.cells(_SOURCES.value, sparsities, kept_flags.SEEDS.value)
    if kept_flags.SHARD.value:
        cells = kept_runs.part(cells, kept_flags.SHARD.value)
    runs = tost_runs.runs(cells, _TRICKS.value)
    tost_runs.train_missing(kept_flags.WORKDIR.value, config, dataset, runs)
    if not kept_flags.SHARD.value:
        tost_report.write(
            pathlib.Path(kept_flags.OUT.value),
            config,
            tost_runs.read(kept_flags.WORKDIR.value, runs),
            command=kept_flags.command(),
        )


if __name__ == "__main__":
    app.run(main)
