import fractions
import math

import hypothesis
import hypothesis.strategies as st
import network_shapes
import oracles
import pytest

from sparsejax import distributions

NETWORKS = {
    "resnet18": network_shapes.resnet18_cifar(),
    "wide_resnet": network_shapes.wide_resnet22_2(),
    "resnet50": network_shapes.resnet50(),
    "resnet50_cifar": network_shapes.resnet50(classes=100, stem=3),
    "vgg19": network_shapes.vgg19(),
}
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)

# The ERK tests hold for both: published numbers keep the oracle honest, too.
both_erk = pytest.mark.parametrize("erk", [distributions.erk, oracles.erk])

shape = st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple)
shapes = st.lists(shape, min_size=1, max_size=8).map(
    lambda drawn: {f"layer{i}/kernel": s for i, s in enumerate(drawn)}
)
# Sparsities as people write them: up to four decimals.
sparsity = st.integers(0, 9999).map(lambda n: n / 10_000)


def size(shape):
    return math.prod(shape)


def total(shapes):
    return sum(size(s) for s in shapes.values())


@pytest.mark.parametrize(
    ("network", "weights"),
    [
        ("resnet18", 11_164_352),
        ("wide_resnet", 1_076_912),
        ("resnet50", 25_502_912),
        ("resnet50_cifar", 23_652_032),
        ("vgg19", 20_070_080),
    ],
)
def test_tables_of_shapes_have_the_published_number_of_weights(network, weights):
    assert total(NETWORKS[network]) == weights


@both_erk
@pytest.mark.parametrize(
    ("network", "sparsity", "dense"),
    [
        (
            "resnet18",
            0.9,
            {
                "conv1/kernel",
                "stage2/block0/shortcut/kernel",
                "stage3/block0/shortcut/kernel",
                "linear/kernel",
            },
        ),
        (
            "resnet18",
            0.95,
            {"conv1/kernel", "stage2/block0/shortcut/kernel", "linear/kernel"},
        ),
        ("resnet18", 0.99, {"linear/kernel"}),
        (
            "wide_resnet",
            0.9,
            {
                "conv1/kernel",
                "block1/layer0/shortcut/kernel",
                "block2/layer0/shortcut/kernel",
                "fc/kernel",
            },
        ),
        ("wide_resnet", 0.99, set()),
        (
            "resnet50",
            0.8,
            {
                "layer1/0/conv1/kernel",
                "layer1/0/conv3/kernel",
                "layer1/0/shortcut/kernel",
                "layer1/1/conv1/kernel",
                "layer1/1/conv3/kernel",
                "layer1/2/conv1/kernel",
                "layer1/2/conv3/kernel",
                "layer2/0/conv1/kernel",
            },
        ),
        ("resnet50", 0.9, {"layer1/0/conv1/kernel"}),
        ("resnet50", 0.95, set()),
        ("resnet50", 0.99, set()),
        ("resnet50_cifar", 0.9, {"conv1/kernel", "layer1/0/conv1/kernel"}),
        ("vgg19", 0.9, {"conv0/kernel", "fc/kernel"}),
    ],
)
def test_erk_leaves_the_published_layers_dense(erk, network, sparsity, dense):
    shapes = NETWORKS[network]
    kept = erk(shapes, sparsity)
    assert {path for path in shapes if kept[path] == size(shapes[path])} == dense


@both_erk
@pytest.mark.parametrize(
    ("sparsity", "stem", "first_stage", "stages", "linear"),
    [
        (0.9, 27, 276, [(204, 270, 64), (201, 267, 128), (199, 265, 198)], 512),
        (0.95, 27, 134, [(99, 131, 64), (97, 129, 96), (96, 128, 96)], 512),
        (0.99, 13, 25, [(18, 24, 18)] * 3, 512),
    ],
)
def test_erk_gives_the_published_fan_in_of_resnet18(
    erk, sparsity, stem, first_stage, stages, linear
):
    shapes = NETWORKS["resnet18"]
    fan_in = {path: n // shapes[path][-1] for path, n in erk(shapes, sparsity).items()}
    expected = {"conv1/kernel": stem, "linear/kernel": linear}
    for block in range(2):
        for conv in ("conv1", "conv2"):
            expected[f"stage1/block{block}/{conv}/kernel"] = first_stage
            for stage, (_, others, _) in enumerate(stages, start=2):
                expected[f"stage{stage}/block{block}/{conv}/kernel"] = others
    for stage, (first, _, shortcut) in enumerate(stages, start=2):
        expected[f"stage{stage}/block0/conv1/kernel"] = first
        expected[f"stage{stage}/block0/shortcut/kernel"] = shortcut
    assert fan_in == expected


@both_erk
def test_erk_gives_the_published_fan_in_of_resnet50(erk):
    shapes = NETWORKS["resnet50"]
    fan_in = [n // shapes[path][-1] for path, n in erk(shapes, 0.99).items()]
    assert fan_in[:12] == [6, 9, 10, 6, 6, 24, 10, 6, 24, 10, 6, 14]


@both_erk
@pytest.mark.parametrize(
    ("network", "sparsity", "density"),
    [
        ("resnet18", 0.9, 0.09988),
        ("resnet18", 0.95, 0.04978),
        ("resnet18", 0.99, 0.00977),
        ("wide_resnet", 0.99, 0.00927),
        ("resnet50", 0.99, 0.00967),
    ],
)
def test_erk_realises_the_published_density_at_equal_fan_in(
    erk, network, sparsity, density
):
    shapes = NETWORKS[network]
    kept = erk(shapes, sparsity)
    equal = sum(n // shapes[path][-1] * shapes[path][-1] for path, n in kept.items())
    assert round(equal / total(shapes), 5) == density


@both_erk
@pytest.mark.parametrize(
    ("network", "path", "density"),
    [
        ("vgg19", "conv1/kernel", 0.6751),
        ("vgg19", "conv4/kernel", 0.2456),
        *[("vgg19", f"conv{i}/kernel", 0.0811) for i in range(9, 16)],
        ("resnet50_cifar", "layer1/0/conv2/kernel", 0.1675),
        ("resnet50_cifar", "layer4/1/conv2/kernel", 0.0201),
        ("resnet50_cifar", "fc/kernel", 0.4832),
        ("resnet50", "conv1/kernel", 0.42),
        ("resnet50", "fc/kernel", 0.0726),
    ],
)
def test_erk_gives_the_published_densities_at_ninety_percent(
    erk, network, path, density
):
    shapes = NETWORKS[network]
    weights = size(shapes[path])
    # Published to four decimals; a count is rounded up to a whole weight.
    tolerance = 0.5e-4 + 1 / weights
    assert erk(shapes, 0.9)[path] / weights == pytest.approx(density, abs=tolerance)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_counts_on_real_networks_equal_the_oracle(network, sparsity):
    shapes = NETWORKS[network]
    assert distributions.erk(shapes, sparsity) == oracles.erk(shapes, sparsity)
    assert distributions.uniform(shapes, sparsity) == oracles.uniform(shapes, sparsity)


@hypothesis.given(shapes, sparsity, st.integers(0, 3))
def test_erk_equals_the_oracle(shapes, sparsity, power):
    kept = distributions.erk(shapes, sparsity, power=power)
    assert kept == oracles.erk(shapes, sparsity, power)


@hypothesis.given(shapes, sparsity)
def test_uniform_equals_the_oracle(shapes, sparsity):
    assert distributions.uniform(shapes, sparsity) == oracles.uniform(shapes, sparsity)


@hypothesis.given(shapes, sparsity)
def test_every_leaf_keeps_between_one_weight_and_all(shapes, sparsity):
    for distribution in (distributions.erk, distributions.uniform):
        for path, kept in distribution(shapes, sparsity).items():
            assert type(kept) is int
            assert 1 <= kept <= size(shapes[path])


@hypothesis.given(shapes, sparsity)
def test_the_sum_is_the_target_but_for_the_rounding_of_each_leaf(shapes, sparsity):
    target = (1 - fractions.Fraction(str(sparsity))) * total(shapes)
    uniform = sum(distributions.uniform(shapes, sparsity).values())
    erk = sum(distributions.erk(shapes, sparsity).values())
    assert 0 <= uniform - target < len(shapes)
    assert 0 <= erk - uniform < len(shapes)


@hypothesis.given(shapes, sparsity, sparsity)
def test_no_leaf_gains_weights_when_sparsity_rises(shapes, one, other):
    lower, higher = sorted((one, other))
    for distribution in (distributions.erk, distributions.uniform):
        more, fewer = distribution(shapes, lower), distribution(shapes, higher)
        assert all(fewer[path] <= more[path] for path in shapes)


@hypothesis.given(shapes, sparsity, st.randoms(use_true_random=False))
def test_erk_does_not_depend_on_the_order_of_the_leaves(shapes, sparsity, random):
    paths = list(shapes)
    random.shuffle(paths)
    shuffled = {path: shapes[path] for path in paths}
    assert distributions.erk(shuffled, sparsity) == distributions.erk(shapes, sparsity)


@hypothesis.given(shape, st.integers(1, 8), sparsity)
def test_erk_treats_equal_shapes_equally(shape, copies, sparsity):
    shapes = {f"layer{i}/kernel": shape for i in range(copies)}
    kept = distributions.erk(shapes, sparsity)
    assert kept == distributions.uniform(shapes, sparsity)


@pytest.mark.parametrize(
    ("sparsity", "weights", "kept"),
    [(0.9, 10, 1), (0.8, 5, 1), (0.7, 10, 3), (0.99, 100, 1), (0.99, 101, 2)],
)
def test_decimal_sparsities_are_taken_as_written(sparsity, weights, kept):
    shapes = {"kernel": (weights, 1)}
    assert distributions.uniform(shapes, sparsity) == {"kernel": kept}
    assert distributions.erk(shapes, sparsity) == {"kernel": kept}


@pytest.mark.parametrize("distribution", [distributions.erk, distributions.uniform])
def test_the_largest_sparsity_below_one_keeps_a_weight_of_every_leaf(distribution):
    shapes = {"a/kernel": (10, 10), "b/kernel": (3, 3, 4, 5)}
    kept = distribution(shapes, math.nextafter(1.0, 0.0))
    # The budget is one weight a layer; ERK shares the two out 8 : 6 and rounds up.
    expected = {distributions.erk: 2, distributions.uniform: 1}[distribution]
    assert kept == {"a/kernel": expected, "b/kernel": 1}


def test_zero_sparsity_keeps_everything():
    shapes = NETWORKS["wide_resnet"]
    dense = {path: size(shape) for path, shape in shapes.items()}
    assert distributions.uniform(shapes, 0.0) == dense
    assert distributions.erk(shapes, 0.0) == dense


@pytest.mark.parametrize("distribution", [distributions.erk, distributions.uniform])
@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_a_sparsity_outside_the_unit_interval_is_refused(distribution, sparsity):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        distribution({"kernel": (4, 4)}, sparsity)
