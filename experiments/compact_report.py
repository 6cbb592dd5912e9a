"""What is said of the demo's small networks: two tables, and a sentence before each."""

import numpy as np

from experiments import report, timing
from experiments.compact_demo import BATCHES, FILES, Compacted


def sections(compacted: Compacted) -> list[str]:
    """Return paragraphs and Markdown tables."""
    return [
        "The first network of RigL and the first dense one. Compaction takes out what "
        "zeros have cut off, and the outputs stay: they differ by "
        f"{compacted.error:.0e} of the largest at most.",
        network_table(compacted),
        "The dense network and the last of these, exported to files and served in a "
        "process that imports no Flax; median time of a call, and its ratio with a "
        "95 % interval:",
        served_table(compacted),
    ]


def network_table(compacted: Compacted) -> str:
    """Return a Markdown table, a line for each network."""
    return report.markdown_table(
        ("network", "neurons", "parameters", "FLOPs, an image", "test accuracy"),
        [
            (
                network.name,
                network.neurons,
                f"{network.parameters:,}",
                f"{network.flops:,}",
                f"{network.accuracy:.2%}",
            )
            for network in compacted.networks
        ],
    )


def served_table(compacted: Compacted) -> str:
    """Return a Markdown table, a line for each file and one for their ratio."""
    served = compacted.served
    times = {name: one.seconds for name, one in served.items()}
    ratios = [
        timing.median_and_interval(times["dense"][size] / times["compacted"][size])
        for size in BATCHES
    ]
    sizes = [f"{size:,} image{'s' * (size > 1)}, µs" for size in BATCHES]
    return report.markdown_table(
        ("file", "bytes", "test accuracy", *sizes),
        [
            (
                FILES[name],
                f"{one.num_bytes:,}",
                f"{one.accuracy:.2%}",
                *(f"{1e6 * np.median(one.seconds[size]):,.0f}" for size in BATCHES),
            )
            for name, one in served.items()
        ]
        + [
            (
                "dense / compacted",
                f"{served['dense'].num_bytes / served['compacted'].num_bytes:.2f}",
                "",
                *(f"{mid:.2f} ({low:.2f} to {high:.2f})" for mid, low, high in ratios),
            )
        ],
    )
