import numpy as np
import pytest

from experiments import demo_report
from experiments.seeds import Round

KERNEL = np.zeros((2, 4, 5), bool)
KERNEL[:, 0] = True


def rounds(seconds, accuracies, masks=None):
    losses = np.ones((10, 2))
    return [Round(0, losses, np.array(accuracies), masks, second) for second in seconds]


@pytest.fixture
def history():
    masks = {"kernel": KERNEL, "bias": None}
    return {
        "dense": rounds([9.0, 1.0, 2.0, 4.0], [0.99, 0.99]),
        "static": rounds([99.0, 1.0, 4.0, 12.0], [0.90, 0.92], masks),
        "rigl": rounds([99.0, 2.0, 4.0, 8.0], [0.93, 0.97], masks),
    }


def test_table(history):
    lines = demo_report.table(history).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    # The quantile of Student's t with one degree of freedom is 12.7062.
    assert cells == [
        ["dense", "99.00 ± 0.00", "20 of 20", "0.00%", "200.00", "1.00 (1.00 to 1.00)"],
        [
            "static",
            "91.00 ± 12.71",
            "5 of 20",
            "75.00%",
            "400.00",
            "2.00 (1.50 to 2.50)",
        ],
        ["rigl", "95.00 ± 25.41", "5 of 20", "75.00%", "400.00", "2.00 (2.00 to 2.00)"],
    ]


def test_gain_is_paired(history):
    expected = "RigL minus static, seed by seed: +4.00 ± 12.71 points."
    assert demo_report.gain(history) == expected
