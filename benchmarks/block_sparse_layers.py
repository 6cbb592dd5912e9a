"""The convolutions of VGG-16 and ResNet-18 for CIFAR, and blocks like the published.

Rows and areas of the blocks are those of the files that were released with
Structure-LTH (Chen et al. 2022, arXiv:2202.04736): VGG-16 after round 10, ResNet-18.
Layers of 128 rows and fewer are one dense block there. Where only a range is known, the
values are spread over it evenly. Which rows and columns a block has is drawn at random
here; it does not change the work.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sparsejax.serving import Blocks


class Layer(NamedTuple):
    """A convolution, and the blocks that its kernel is left with."""

    n_in: int
    n_out: int
    size: int  # of the kernel
    image: int  # height and width of the input
    stride: int
    area: float  # of the blocks, as a part of the kernel
    rows: tuple[int, ...]  # of each block

    @property
    def kernel_shape(self) -> tuple[int, int, int, int]:
        return self.size, self.size, self.n_in, self.n_out

    def blocks(self, rng: np.random.Generator) -> Blocks:
        """Draw disjoint rows, and columns for each block."""
        n_columns = self.size**2 * self.n_in
        ends = np.cumsum(self.rows)[:-1]
        rows = np.split(rng.permutation(self.n_out), ends)
        taken = round(self.area * n_columns)
        return Blocks(
            self.kernel_shape,
            [(one, rng.choice(n_columns, taken, replace=False)) for one in rows],
        )


UNEVEN = (36, 44, 52, 60, 68, 76, 84, 92)


def vgg16() -> dict[str, Layer]:
    """Return the thirteen layers by their name in the released network."""
    table = [
        ("features.0", 3, 64, 32, 1.0, (64,)),
        ("features.3", 64, 64, 32, 1.0, (64,)),
        ("features.7", 64, 128, 16, 1.0, (128,)),
        ("features.10", 128, 128, 16, 1.0, (128,)),
        ("features.14", 128, 256, 8, 0.796, (32,) * 8),
        ("features.17", 256, 256, 8, 0.679, (32,) * 8),
        ("features.20", 256, 256, 8, 0.603, (32,) * 8),
        ("features.24", 256, 512, 4, 0.430, (64,) * 8),
        ("features.27", 512, 512, 4, 0.203, UNEVEN),
        ("features.30", 512, 512, 4, 0.118, UNEVEN),
        ("features.34", 512, 512, 2, 0.074, UNEVEN),
        ("features.37", 512, 512, 2, 0.069, UNEVEN),
        ("features.40", 512, 512, 2, 0.089, UNEVEN),
    ]
    return {
        name: Layer(n_in, n_out, 3, image, 1, area, rows)
        for name, n_in, n_out, image, area, rows in table
    }


def resnet18() -> dict[str, Layer]:
    """Return the twenty layers by their name in the released network."""
    layers = {"conv1": Layer(3, 64, 3, 32, 1, 1.0, (64,))}
    # Areas of the four 3x3 convolutions of a stage and of its shortcut.
    stages: Sequence[tuple[int, Sequence[float], float]] = [
        (64, (1.0,) * 4, 1.0),
        (128, (1.0,) * 4, 1.0),
        (256, (0.64, 0.58, 0.52, 0.46), 0.88),
        (512, (0.39, 0.32, 0.24, 0.17), 0.66),
    ]
    n_in, image = 64, 32
    for number, (n_out, areas, shortcut) in enumerate(stages, 1):
        stride = 1 if number == 1 else 2
        rows = (n_out // 8,) * 8 if n_out > 128 else (n_out,)
        small = image // stride
        for i, area in enumerate(areas):
            name = f"layer{number}.{i // 2}.conv{i % 2 + 1}"
            first = (n_in, n_out, 3, image, stride) if i == 0 else None
            shape = first or (n_out, n_out, 3, small, 1)
            layers[name] = Layer(*shape, area, rows)
        if stride == 2:
            shape = (n_in, n_out, 1, image, stride)
            layers[f"layer{number}.0.shortcut"] = Layer(*shape, shortcut, rows)
        n_in, image = n_out, small
    return layers


NETWORKS = {"VGG-16": vgg16, "ResNet-18": resnet18}
