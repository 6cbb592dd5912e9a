"""What compaction costs and gives: analysis, exactness, and time before and after.

    python benchmarks/compaction.py [--out results] [--only ResNet ViT] [--batch 8 1]

Half of the channels of every group are masked at random, by `report.zero`; all weights,
biases, scales and statistics are random. Each network has a process of its own, whose
first act is to compact it, so that the time of analysis is that of a first call. Then
the masked and the compacted network are compiled, their weights being arguments, and
called in turn, so that a ratio compares what the same machine did in the same second.
About ten minutes on 2 CPU cores.
"""

import argparse
import concurrent.futures
import functools
import importlib.util
import multiprocessing
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

# A script finds its own folder first; the modules are named from the repository root.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks import pages  # noqa: E402
from benchmarks.compaction_networks import CASES, with_random_weights  # noqa: E402
from experiments import timing  # noqa: E402
from sparsejax import analysis  # noqa: E402

ANALYSED_BATCH = 2
READING = """\
Every network loses half of the channels of each group, or what its name says, and the
masked one costs what the dense one costs. Parameters: with statistics of BatchNorm.
Error: the largest difference of outputs, relative to the largest output, at a batch
size beyond the analysed one. Analysis: tracing and analysis as the first call of a
process, without compilation. FLOP ratio: multiply-adds of contractions before and
after. Times are medians; a speed-up is the median of the ratios of rounds, in which the
two networks took turns, with its 95 % interval, and then as part of the FLOP ratio."""

Row = dict[str, Any]


def masked_weights(name: str, seed: int) -> list[np.ndarray]:
    """Return the leaves of a network with random weights and masked channels."""
    case, rng = CASES[name], np.random.default_rng(seed)
    network = case.build()
    params = with_random_weights(network.params, rng)
    x = jax.ShapeDtypeStruct((ANALYSED_BATCH, *network.example), network.dtype)
    report = network.groups(params, x)
    chosen = {}
    for group in report.groups:
        free = np.flatnonzero(group.removable)
        chosen[group.name] = rng.permutation(free)[: round(case.fraction * len(free))]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(report.zero(params, chosen))]


def measure(
    name: str, leaves: list[np.ndarray], batches: Sequence[int], seconds: float
) -> Row:
    """Compact a masked network and time both; to be called in a fresh process."""
    case = CASES[name]
    network = case.build()
    masked = jax.tree.structure(network.params).unflatten(map(jax.device_put, leaves))
    x = jax.ShapeDtypeStruct((ANALYSED_BATCH, *network.example), network.dtype)
    begin = time.perf_counter()
    small_call, small, report = network.compact(
        masked, x, round_to=case.round_to, verify=False
    )
    row = {
        "back-end": "rebuild" if network.fn is None else "replay",
        "parameters": report.parameters,
        "analysis s": report.seconds,
        "compact s": time.perf_counter() - begin,
        "flops": [
            analysis.flops(functools.partial(call, params), x) // ANALYSED_BATCH
            for call, params in ((network.call, masked), (small_call, small))
        ],
        "batches": {},
    }
    rng = np.random.default_rng(0)
    for batch in batches:
        x = jax.device_put(network.inputs(batch, rng))
        calls = {
            "masked": compiled(network.call, masked, x),
            "compacted": compiled(small_call, small, x),
        }
        if batch > ANALYSED_BATCH:
            row["error"] = largest_error(*(np.asarray(run()) for run in calls.values()))
        times = timing.in_turn(calls, seconds=seconds, min_rounds=7)
        row["batches"][batch] = {
            "masked ms": 1e3 * np.median(times["masked"]),
            "compacted ms": 1e3 * np.median(times["compacted"]),
            "speed-up": timing.median_and_interval(
                times["masked"] / times["compacted"]
            ),
            "rounds": len(times["masked"]),
        }
    return row


def compiled(call: Callable, params: Any, x: jax.Array) -> Callable[[], jax.Array]:
    """Compile a call on these arrays, which are its arguments and no constants."""
    leaves, tree = jax.tree.flatten(params)
    run = jax.jit(lambda leaves, x: call(tree.unflatten(leaves), x))
    return functools.partial(run.lower(leaves, x).compile(), leaves, x)


def largest_error(masked: np.ndarray, compacted: np.ndarray) -> float:
    """Return the largest difference, relative to the largest output of the masked.

    Raises:
      ValueError: the output does not depend on the input: a comparison says nothing.
    """
    scale = np.abs(masked).max()
    if not np.ptp(masked, axis=0).max() > 1e-2 * scale > 0:
        raise ValueError("The masked network returns the same for all examples.")
    return float(np.abs(masked - compacted).max() / scale)


def measure_all(names: Sequence[str], args: argparse.Namespace) -> dict[str, Row]:
    """Measure networks one after another; print what each came to."""
    rows, begin = {}, time.perf_counter()
    for number, name in enumerate(names, 1):
        if "Equinox" in name and importlib.util.find_spec("equinox") is None:
            rows[name] = {"missing": "Equinox is not installed"}
        else:
            leaves = masked_weights(name, args.seed)
            process = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, process) as pool:
                rows[name] = pool.submit(
                    measure, name, leaves, args.batch, args.seconds
                ).result()
        passed = f"{time.perf_counter() - begin:.0f} s"
        print(f"{number}/{len(names)}, {passed}: {line(name, rows[name], args.batch)}")
        sys.stdout.flush()
    return rows


def line(name: str, row: Row, batches: Sequence[int]) -> str:
    """Return a line of the table."""
    if "missing" in row:
        return f"| {name} | {row['missing']} |"
    before, after = row["parameters"]
    ratio = row["flops"][0] / row["flops"][1]
    cells = [
        name,
        row["back-end"],
        f"{before:,} -> {after:,}",
        f"{row['error']:.0e}" if "error" in row else "",
        f"{row['analysis s']:.2f}",
        f"{ratio:.2f}",
    ]
    for batch in batches:
        figures = row["batches"][batch]
        median, low, high = figures["speed-up"]
        cells += [
            f"{figures['masked ms']:.3g} -> {figures['compacted ms']:.3g}",
            f"{median:.2f} ({low:.2f} to {high:.2f})",
            f"{median / ratio:.2f}",
        ]
    return "| " + " | ".join(cells) + " |"


def table(rows: dict[str, Row], batches: Sequence[int]) -> str:
    """Return the rows as a Markdown table."""
    header = ["", "back-end", "parameters", "error", "analysis s", "FLOP ratio"]
    for batch in batches:
        header += [f"ms, batch {batch}", "speed-up", "of FLOP ratio"]
    return "\n".join(
        [
            "| " + " | ".join(header) + " |",
            "|---" * len(header) + "|",
            *(line(name, row, batches) for name, row in rows.items()),
        ]
    )


def aims(rows: dict[str, Row]) -> str:
    """Say of each aim whether it is met."""
    lines = []
    for name in ("ResNet-50, 224", "ViT-B/16, 224"):
        if name in rows:
            seconds = rows[name]["analysis s"]
            lines.append(
                f"{name}: analysis {seconds:.2f} s, aim 2: {_met(seconds <= 2)}"
            )
    row = rows.get("ResNet-50, 224")
    if row and 8 in row["batches"]:
        before, after = row["flops"]
        part = row["batches"][8]["speed-up"][0] * after / before
        lines.append(
            "ResNet-50, 224: speed-up at batch 8 as a part of the FLOP ratio "
            f"{part:.2f}, aim 0.8: {_met(part >= 0.8)}"
        )
    return "\n".join(f"- {line}." for line in lines)


def _met(is_met: bool) -> str:
    return "met" if is_met else "MISSED"


def main() -> None:
    """Measure, print the table, and write it where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", help="parts of the names of networks")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--seconds", type=float, default=3, help="of timing each batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="folder for the table")
    args = parser.parse_args()
    wanted = lambda name: not args.only or any(part in name for part in args.only)
    rows = measure_all([name for name in CASES if wanted(name)], args)
    parts = [table(rows, args.batch), READING, aims(rows)]
    text = "\n\n".join(filter(None, parts))
    pages.publish("compaction", text, {"rows": rows}, args.out, packages=["flax"])


if __name__ == "__main__":
    main()
