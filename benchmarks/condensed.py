"""What constant fan-in saves: a linear layer dense, structured and condensed.

    python benchmarks/condensed.py [--out results] [--batches 1 8 64 256]

The layers are those between which a ViT-B/16's tokens have 768 and 3072 features, with
the weights that SRigL leaves: as many for each neuron that lives, and all neurons live
or, at the same number of weights, a third of them. Called in turn in one process are

- dense: XLA's product with the masked kernel;
- structured: the product with the columns of living neurons, as compaction leaves it;
- condensed: `serving.condensed_linear` of living neurons, from their weights alone.

About two minutes on 2 idle CPU cores.
"""

import argparse
import functools
import itertools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

# A script finds its own folder first; the modules are named from the repository root.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks import pages  # noqa: E402
from experiments import report, timing  # noqa: E402
from sparsejax import serving  # noqa: E402

SHAPES = ((768, 3072), (3072, 768))
DENSITIES = (0.2, 0.1, 0.05, 0.01)
LIVING = (1.0, 1 / 3)

READING = """\
float32. Dense: the median of the product with the masked kernel. The others: the median
of the ratios of rounds to it, with its 95 % interval. Memory: of weights and indices,
relative to the dense kernel. The largest difference to the dense layer, relative to its
largest output: {error:.0e}."""

Row = dict[str, Any]


def draw(
    rng: np.random.Generator, shape: tuple[int, int], density: float, living: float
) -> np.ndarray:
    """Draw a mask [in, out] of constant fan-in."""
    n_in, n_out = shape
    neurons = rng.permutation(n_out)[: round(living * n_out)]
    fan_in = round(density * n_in * n_out / len(neurons))
    mask = np.zeros(shape, bool)
    for neuron in neurons:
        mask[rng.choice(n_in, fan_in, replace=False), neuron] = True
    return mask


def measure(mask: np.ndarray, batch: int, seconds: float) -> Row:
    """Time a layer in all forms."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=mask.shape) * mask, "f4")
    x = jnp.asarray(rng.normal(size=(batch, mask.shape[0])), "f4")
    weights, columns, living, _ = serving.condense(kernel, mask)
    every = np.arange(len(living))

    def condensed(x, weights, columns):
        return serving.condensed_linear(x, weights, columns, every, len(every))

    product = jax.jit(jnp.matmul)
    calls = {
        "dense": functools.partial(product, x, kernel),
        "structured": functools.partial(product, x, kernel[:, living]),
        "condensed": functools.partial(jax.jit(condensed), x, weights, columns),
    }
    expected = calls["dense"]()[:, living]
    error = float(jnp.abs(calls["condensed"]() - expected).max())
    times = timing.in_turn(calls, seconds=seconds)
    return {
        "shape": mask.shape,
        "density": float(mask.mean()),
        "living": len(living),
        "fan_in": weights.shape[1],
        "batch": batch,
        "error": error / float(jnp.abs(expected).max()),
        "dense ms": 1e3 * float(np.median(times["dense"])),
        "time / dense": {
            name: timing.median_and_interval(own / times["dense"])
            for name, own in times.items()
            if name != "dense"
        },
        "memory": (weights.nbytes + columns.nbytes) / kernel.nbytes,
    }


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    ratio = lambda row, form: "{:.2f} ({:.2f} to {:.2f})".format(
        *row["time / dense"][form]
    )
    header = ["layer", "density", "living", "fan-in", "batch", "dense ms"]
    header += ["structured / dense", "condensed / dense", "memory"]
    return report.markdown_table(
        header,
        [
            (
                "{} to {}".format(*row["shape"]),
                f"{row['density']:.0%}",
                str(row["living"]),
                str(row["fan_in"]),
                str(row["batch"]),
                f"{row['dense ms']:.3f}",
                ratio(row, "structured") if row["living"] < row["shape"][1] else "",
                ratio(row, "condensed"),
                f"{row['memory']:.2f}",
            )
            for row in rows
        ],
    )


def main() -> None:
    """Measure, print the table, and write it where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--seconds", type=float, default=1.5, help="of each row")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the table")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    masks = [draw(rng, *of) for of in itertools.product(SHAPES, DENSITIES, LIVING)]
    cases = list(itertools.product(masks, args.batches))
    rows = [measure(*case, args.seconds) for case in tqdm(cases, unit="layer")]
    error = max(row["error"] for row in rows)
    pages.publish(
        "condensed",
        f"{READING.format(error=error)}\n\n{table(rows)}",
        {"rows": rows},
        args.out,
        title="Constant fan-in: what condensed layers save",
    )


if __name__ == "__main__":
    main()
