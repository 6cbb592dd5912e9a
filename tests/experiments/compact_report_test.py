import numpy as np

from experiments import compact_report
from experiments.compact_demo import Compacted, Network, Served


def served(num_bytes, microseconds):
    of_size = lambda times: np.array(times) * 1e-6
    sizes = (1, 256, 4096)
    times = dict(zip(sizes, map(of_size, microseconds), strict=True))
    return Served(num_bytes, 0.875, times)


COMPACTED = Compacted(
    [Network("small", "7, 5", 1234, 5678, 0.9)],
    3.4e-7,
    {
        "dense": served(1000, ([6, 4], [300, 500], [2000, 9000])),
        "compacted": served(250, ([3, 4], [100, 100], [1000, 1000])),
    },
)


def cells(table):
    rows = table.splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_network_table():
    expected = [["small", "7, 5", "1,234", "5,678", "90.00%"]]
    assert cells(compact_report.network_table(COMPACTED)) == expected


def test_ratios_are_taken_round_by_round():
    assert cells(compact_report.served_table(COMPACTED)) == [
        ["dense.safetensors", "1,000", "87.50%", "5", "400", "5,500"],
        ["compacted.safetensors", "250", "87.50%", "4", "100", "1,000"],
        [
            "dense / compacted",
            "4.00",
            "",
            "1.50 (1.00 to 2.00)",
            "4.00 (3.00 to 5.00)",
            "5.50 (2.00 to 9.00)",
        ],
    ]


def test_sections_name_the_error():
    assert "differ by 3e-07 of the largest" in compact_report.sections(COMPACTED)[0]
