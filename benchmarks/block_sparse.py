"""What blocks save: every convolution of VGG-16 and ResNet-18, measured by itself.

    python benchmarks/block_sparse.py [--out results] [--batch 64]

Each layer has its real shape for images of 32 x 32, and blocks of the published sizes;
see `block_sparse_layers.py`. Called in turn in one process, as `serving.measure_forms`
does it, so that a ratio compares what the machine did in the same second, are

- the dense layer in both forms that XLA has for it, its own convolution and one product
  with the unfolded image; the faster one is what everything else is compared with;
- the layer in each form that `sparsejax.serving` has for blocks;
- a dense layer of fewer output channels, as `lottery.refill` and compaction leave it,
  at the same density, in the faster of its two forms.

About two minutes on 2 idle CPU cores.
"""

import argparse
import functools
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# A script finds its own folder first; the modules are named from the repository root.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks import pages  # noqa: E402
from benchmarks.block_sparse_layers import NETWORKS, Layer  # noqa: E402
from sparsejax.serving import Blocks  # noqa: E402
from sparsejax.serving.block_sparse_choice import (  # noqa: E402
    DENSE,
    Measured,
    compiled,
    times_in_turn,
)

READING = """\
Density: the part of the kernel's weights, and so of its multiply-adds, that is in
blocks: the FLOP ratio. Times are medians of a forward pass, float32. Dense: the faster
of XLA's convolution and one product with the unfolded image (marked *). Blocks: the
fastest form. Time / dense: the median of the ratios of rounds, with their 10 % and 90 %
quantiles. Compacted: a dense layer with that part of the output channels. Chosen: what
`serving.with_blocks` takes: the fastest of all but the compacted one, which is another
network, if it saves a tenth of XLA's convolution. A layer of density 1 has one block,
all of it, and nothing to gain."""

Row = dict[str, Any]


def measure(layer: Layer, batch: int, seconds: float) -> Row:
    """Measure one layer in all forms."""
    rng = np.random.default_rng(0)
    blocks = layer.blocks(rng)
    window = {"strides": layer.stride, "padding": layer.size // 2}
    x = jnp.asarray(
        rng.normal(size=(batch, layer.image, layer.image, layer.n_in)), "f4"
    )
    kernel = jnp.asarray(rng.normal(size=blocks.shape) * blocks.mask, "f4")
    calls = compiled(blocks, x, kernel, **window)
    error = max(map(functools.partial(largest_error, calls["dense"]()), calls.values()))
    if blocks.density < 1:
        left = math.ceil(blocks.density * layer.n_out)
        narrow = Blocks.full((*blocks.shape[:-1], left))
        small = compiled(narrow, x, kernel[..., :left], **window)
        calls |= {f"compacted {form}": small[form] for form in DENSE}
    times = times_in_turn(calls, seconds)
    medians = {form: 1e3 * float(np.median(values)) for form, values in times.items()}
    fastest = lambda forms: min(forms, key=medians.__getitem__)
    base = fastest(DENSE)
    ratios = {
        form: quantiles(values / times[base][: len(values)])
        for form, values in times.items()
    }
    own = [form for form in calls if not form.startswith("compacted")]
    return {
        "layer": layer._asdict(),
        "density": blocks.density,
        "error": error,
        "rounds": len(times[base]),
        "ms": medians,
        "time / dense": ratios,
        "dense": base,
        "blocks": fastest([f for f in own if f not in DENSE] or [base]),
        "compacted": fastest([f for f in calls if f not in own] or [base]),
        "chosen": Measured("", {form: medians[form] for form in own}).best,
    }


def largest_error(expected: jax.Array, call: Callable[[], jax.Array]) -> float:
    """Return the largest difference to the dense layer, relative to its output."""
    scale = float(jnp.abs(expected).max())
    return float(jnp.abs(call() - expected).max()) / scale


def quantiles(values: np.ndarray) -> list[float]:
    """Return the median and the 10 % and 90 % quantiles."""
    return np.quantile(values, [0.5, 0.1, 0.9]).tolist()


def measure_all(batch: int, seconds: float) -> dict[str, dict[str, Row]]:
    """Measure all layers by network and name; equal ones are measured once."""
    done: dict[Layer, Row] = {}
    networks, begin = {}, time.perf_counter()
    for network, layers in NETWORKS.items():
        networks[network] = {}
        for name, layer in layers().items():
            if layer not in done:
                done[layer] = measure(layer, batch, seconds)
            networks[network][name] = done[layer]
            passed = f"{time.perf_counter() - begin:.0f} s"
            print(f"{passed}: {network} {line(name, done[layer])}", flush=True)
    return networks


def line(name: str, row: Row) -> str:
    """Return a line of the table."""
    layer, ms = Layer(**row["layer"]), row["ms"]
    stride = f" / {layer.stride}" if layer.stride > 1 else ""

    def against_dense(form: str) -> str:
        median, low, high = row["time / dense"][form]
        spread = f" ({low:.2f} to {high:.2f})" if low < high else ""  # one round
        return f"{median:.2f}{spread}"

    cells = [
        name,
        f"{layer.size}x{layer.size}, {layer.n_in} to {layer.n_out}{stride}",
        f"{layer.image}x{layer.image}",
        f"{row['density']:.3f}",
        f"{ms[row['dense']]:.3g}" + ("*" if row["dense"] == "unfolded" else ""),
    ]
    if row["density"] < 1:
        blocks, compacted = row["blocks"], row["compacted"]
        cells += [f"{ms[blocks]:.3g} {blocks}", against_dense(blocks)]
        cells += [f"{ms[compacted]:.3g}", against_dense(compacted)]
    else:
        cells += [""] * 4
    cells.append("dense" if row["chosen"] in DENSE else row["chosen"])
    return "| " + " | ".join(cells) + " |"


def table(rows: dict[str, Row]) -> str:
    """Return the layers of a network as a Markdown table."""
    header = ["layer", "kernel", "image", "density", "dense ms", "blocks ms"]
    header += ["time / dense", "compacted ms", "time / dense", "chosen"]
    return "\n".join(
        [
            "| " + " | ".join(header) + " |",
            "|---" * len(header) + "|",
            *(line(name, row) for name, row in rows.items()),
        ]
    )


def total(network: str, rows: Iterable[Row]) -> str:
    """Say what all convolutions of a network take together, each as chosen."""
    rows = list(rows)
    dense = sum(row["ms"][row["dense"]] for row in rows)
    chosen = sum(row["ms"][row["chosen"]] for row in rows)
    own = sum(row["ms"]["dense"] for row in rows)
    swapped = [row for row in rows if row["chosen"] not in DENSE]
    apart = sum(row["ms"][row["dense"]] for row in swapped)
    saved = apart - sum(row["ms"][row["chosen"]] for row in swapped)
    return (
        f"{network}, all convolutions: {dense:.3g} ms dense, {chosen:.3g} ms as "
        f"chosen: {1 - chosen / dense:.0%} saved. The {len(swapped)} layers that run "
        f"from blocks take {apart:.3g} ms dense; {saved / apart:.0%} of that is saved. "
        f"(XLA's own convolutions alone: {own:.3g} ms.)"
    )


def main() -> None:
    """Measure, print the tables, and write them where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3, help="of each layer")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the tables")
    args = parser.parse_args()
    networks = measure_all(args.batch, args.seconds)
    parts = [f"Batch {args.batch}. {READING}"]
    for name, rows in networks.items():
        parts += [f"## {name}", table(rows), total(name, rows.values())]
    errors = [row["error"] for rows in networks.values() for row in rows.values()]
    parts.append(f"Largest relative difference between forms: {max(errors):.0e}.")
    figures = {"batch": args.batch, "networks": networks}
    pages.publish("block_sparse", "\n\n".join(parts), figures, args.out)


if __name__ == "__main__":
    main()
