"""Serve exported classifiers side by side: their accuracy, and how long a call takes.

    python experiments/serve.py --examples=examples.npz a.safetensors b.safetensors

Imports neither Flax nor the code of the models. `examples.npz` holds `images`, as the
models take them, and `labels`. Prints a line of JSON: the accuracy of each model, and
the seconds of many calls with each number of images, in which the models take turns.
"""

import json
import pathlib
import sys

import jax
import numpy as np
from absl import app, flags

# A script finds its own folder first; the modules are named from the repository root.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import timing  # noqa: E402
from sparsejax import serving  # noqa: E402

_EXAMPLES = flags.DEFINE_string("examples", None, "Images and labels.", required=True)
_BATCHES = flags.DEFINE_multi_integer("batch", [1], "Images in a call.")
_SECONDS = flags.DEFINE_float("seconds", 1.0, "How long each number is timed.")


def main(argv: list[str]) -> None:
    models = {pathlib.Path(path).name: serving.load(path) for path in argv[1:]}
    with np.load(_EXAMPLES.value) as examples:
        images, labels = examples["images"], examples["labels"]
    accuracy, seconds = {}, {}
    for name, model in models.items():
        predicted = np.asarray(model(images)).argmax(axis=-1)
        accuracy[name] = float((predicted == labels).mean())
    for size in _BATCHES.value:
        batch = jax.device_put(np.resize(images, (size, *images.shape[1:])))
        calls = {
            name: lambda model=model, batch=batch: model(batch)
            for name, model in models.items()
        }
        times = timing.in_turn(calls, seconds=_SECONDS.value)
        seconds[size] = {name: values.tolist() for name, values in times.items()}
    print(json.dumps({"accuracy": accuracy, "seconds": seconds}))


if __name__ == "__main__":
    app.run(main)
