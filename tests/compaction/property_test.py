"""Random networks under random masks compute the same when they are compacted."""

import collections
import re

import jax
import numpy as np
import pytest
import random_networks
from compaction_checks import (
    abstract,
    assert_exact,
    depends_on_input,
    groups_of,
    random_channels,
    run,
    shapes,
    without,
)

from sparsejax import compaction

FRACTIONS = (0.0, 0.3, 0.5, 0.9, 1.0)


def tally(check, seeds):
    """Check each seed; return how many ended how. All failures are told together."""
    outcomes, failures = collections.Counter(), []
    for seed in seeds:
        try:
            outcomes[check(seed)] += 1
        except Exception as error:
            text = random_networks.network(seed).text
            failures.append(f"seed {seed} ({text}): {type(error).__name__}: {error}")
    assert not failures, f"{len(failures)} failures:\n" + "\n".join(failures)
    return outcomes


def masked(seed, mask):
    """Draw a network and masks for it until the output depends on the input.

    `mask` takes a generator, the network and the number of masks tried before.
    """
    net = random_networks.network(seed)
    rng = np.random.default_rng([seed, 1])
    for attempt in range(4):
        params, chosen = mask(rng, net, attempt)
        params = jax.tree.map(np.asarray, params)
        expected = run(net.fn, params, net.x)
        if depends_on_input(expected):
            return net, params, chosen, expected
    return None


def whole_groups(seed):
    """Compact a network in which whole groups are zero."""
    report = None

    def mask(rng, net, attempt):
        nonlocal report
        report = report or groups_of(
            net.fn, net.params, abstract(net.x[: 1 + seed % 4])
        )
        fractions = FRACTIONS[: len(FRACTIONS) - attempt]
        chosen = random_channels(rng, report, fractions)
        return report.zero(net.params, chosen), chosen

    drawn = masked(seed, mask)
    if drawn is None:
        return "degenerate"
    net, params, chosen, expected = drawn
    example = net.x[: 1 + seed % 4]
    example = abstract(example) if seed % 3 else example
    fn, small, after = compaction.compact_fn(net.fn, params, example, verify=False)
    assert_exact(fn, small, expected, net.x)

    full, left = shapes(params), shapes(small)
    assert left.keys() == full.keys()
    for name, channels in chosen.items():
        # A later norm may shift what is masked, and a slice may leave it out.
        if after.removed.get(name, 0) < len(channels):
            assert re.search("leaves a constant|nothing sums over", after.kept[name])
            break
    else:
        for path, shape in without(report, chosen, full).items():
            assert len(left[path]) == len(shape)
            assert np.all(np.less_equal(left[path], shape)), (
                f"{path} has shape {left[path]}, but only {shape} is alive"
            )
    for one, other in zip(*map(jax.tree.leaves, (small, params)), strict=True):
        assert one.dtype == other.dtype
        assert np.isin(one, other).all()  # sliced, not computed
    return "removed" if chosen else "nothing masked"


def by_hand(seed):
    """Compact a network in which slices of single parameters are zero."""
    drawn = masked(seed, lambda rng, net, attempt: (zero_slices(rng, net.params), None))
    if drawn is None:
        return "degenerate"
    net, params, _, expected = drawn
    fn, small, _ = compaction.compact_fn(
        net.fn,
        params,
        net.x[: 1 + seed % 4],
        constants=("exact", "map", "keep")[seed % 3],
        on_unknown="pin",
        verify=False,
    )
    assert_exact(fn, small, expected, net.x)
    before, after = (
        sum(np.size(leaf) for leaf in jax.tree.leaves(tree)) for tree in (params, small)
    )
    assert after <= before
    return "removed" if after < before else "nothing removed"


def zero_slices(rng, params):
    """Zero slices of random parameters, of one or of all the leaves of a module."""
    if rng.random() < 0.1:
        return params  # what is dead by chance, or by a constant mask
    zeroed = {}
    for name, module in params.items():
        flat, tree = jax.tree.flatten_with_path(module)
        leaves = [np.array(leaf) for _, leaf in flat]
        together, fraction = rng.random() < 0.5, rng.choice([0.3, 0.6])
        outputs = {n: rng.random(n) < fraction for leaf in leaves for n in leaf.shape}
        for (path, _), leaf in zip(flat, leaves, strict=True):
            if path[-1].key in ("mean", "var"):
                continue
            if together:
                leaf[..., outputs[leaf.shape[-1]]] = 0
            elif rng.random() < 0.5:
                axis = rng.choice([leaf.ndim - 1, int(rng.integers(leaf.ndim))])
                dead = np.flatnonzero(rng.random(leaf.shape[axis]) < fraction)
                leaf[(slice(None),) * axis + (dead,)] = 0
        zeroed[name] = jax.tree.unflatten(tree, leaves)
    return zeroed


@pytest.mark.parametrize("block", range(3))
def test_whole_groups_go_and_the_output_stays(block):
    assert_mostly_removed(tally(whole_groups, seeds(block, 8)))


@pytest.mark.parametrize("block", range(2))
def test_inconsistent_masks_are_never_taken_for_more_than_they_are(block):
    assert_mostly_removed(tally(by_hand, seeds(block, 8)))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_whole_groups_go_and_the_output_stays_in_many_networks(block):
    assert_mostly_removed(tally(whole_groups, seeds(block, 25, after=1000)))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_many_inconsistent_masks_are_never_taken_for_more_than_they_are(block):
    assert_mostly_removed(tally(by_hand, seeds(block, 25, after=2000)))


def seeds(block, size, after=0):
    return range(after + block * size, after + (block + 1) * size)


def assert_mostly_removed(outcomes):
    """Require that the cases prove something."""
    cases = sum(outcomes.values())
    assert outcomes["degenerate"] <= cases / 3, outcomes
    assert outcomes["removed"] >= cases / 2, outcomes
