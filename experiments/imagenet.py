"""Train on ImageNet, on one machine or on a pod: `classify.py` by its better name.

    python experiments/imagenet.py --config=configs/imagenet_srigl.py \
        --workdir=DIR --config.data.data_dir=DATA --distributed

Start the same command on every host; DIR is a folder that all of them see. The flags
are those of `classify.py`, and so is everything else: what is ImageNet about a run is
in its config.
"""

import pathlib
import sys

from absl import app

# A script finds its own folder first; the modules are named from the repository root.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import classify  # noqa: E402

if __name__ == "__main__":
    app.run(classify.main)
