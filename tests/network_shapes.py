"""Weight shapes of well-known networks, written down apart from any model code.

Every function returns an ordered ``dict`` from parameter path to shape, HWIO for
convolutions and ``[in, out]`` for linear layers, in the order in which the forward
pass first meets the weight; a shortcut comes last in its block.  Biases and
normalisation parameters are left out, because they are never masked.
"""

Shapes = dict[str, tuple[int, ...]]


def resnet18_cifar(classes: int = 10) -> Shapes:
    """List the ResNet-18 with a 3x3 stem and no pooling (11,164,352 weights)."""
    shapes: Shapes = {"conv1/kernel": (3, 3, 3, 64)}
    features = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            prefix = f"stage{stage}/block{block}"
            shapes[f"{prefix}/conv1/kernel"] = (3, 3, features, width)
            shapes[f"{prefix}/conv2/kernel"] = (3, 3, width, width)
            if features != width:
                shapes[f"{prefix}/shortcut/kernel"] = (1, 1, features, width)
            features = width
    shapes["linear/kernel"] = (features, classes)
    return shapes


def wide_resnet22_2(classes: int = 10) -> Shapes:
    """List the WideResNet-22-2: three groups of three blocks (1,076,912 weights)."""
    shapes: Shapes = {"conv1/kernel": (3, 3, 3, 16)}
    features = 16
    for group, width in enumerate((32, 64, 128), start=1):
        for layer in range(3):
            prefix = f"block{group}/layer{layer}"
            shapes[f"{prefix}/conv1/kernel"] = (3, 3, features, width)
            shapes[f"{prefix}/conv2/kernel"] = (3, 3, width, width)
            if features != width:
                shapes[f"{prefix}/shortcut/kernel"] = (1, 1, features, width)
            features = width
    shapes["fc/kernel"] = (features, classes)
    return shapes


def resnet50(classes: int = 1000, stem: int = 7) -> Shapes:
    """List the bottleneck ResNet-50 (25,502,912 weights at the default arguments).

    With ``classes=100, stem=3`` it is the CIFAR-100 variant (23,652,032 weights).
    """
    shapes: Shapes = {"conv1/kernel": (stem, stem, 3, 64)}
    features = 64
    stages = zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True)
    for stage, (width, blocks) in enumerate(stages, start=1):
        for block in range(blocks):
            prefix = f"layer{stage}/{block}"
            shapes[f"{prefix}/conv1/kernel"] = (1, 1, features, width)
            shapes[f"{prefix}/conv2/kernel"] = (3, 3, width, width)
            shapes[f"{prefix}/conv3/kernel"] = (1, 1, width, 4 * width)
            if block == 0:
                shapes[f"{prefix}/shortcut/kernel"] = (1, 1, features, 4 * width)
            features = 4 * width
    shapes["fc/kernel"] = (features, classes)
    return shapes


def vgg19(classes: int = 100) -> Shapes:
    """List the VGG-19 with a single linear layer (20,070,080 weights)."""
    shapes: Shapes = {}
    features = 3
    widths = 2 * (64,) + 2 * (128,) + 4 * (256,) + 8 * (512,)
    for index, width in enumerate(widths):
        shapes[f"conv{index}/kernel"] = (3, 3, features, width)
        features = width
    shapes["fc/kernel"] = (features, classes)
    return shapes
