"""What every test of compaction asks: is the smaller model the masked one?"""

import jax
import numpy as np

from sparsejax import compaction
from sparsejax.masks.layout import named_leaves

# Most of the time goes to compilation, and small networks run fast enough without.
QUICK = {"xla_backend_optimization_level": 0}


def run(fn, *args):
    """Return the output of a compiled function as float32."""
    return np.asarray(jax.jit(fn, compiler_options=QUICK)(*args)).astype(np.float32)


def relative_error(actual, expected):
    """Return the largest difference, relative to the largest expected value."""
    assert actual.shape == expected.shape
    assert np.isfinite(expected).all()
    scale = np.abs(expected).max()
    return np.abs(actual - expected).max() / (scale or 1)


def depends_on_input(y):
    """Tell whether an output differs from example to example."""
    return y.std(axis=0).max() > 1e-3 * np.abs(y).max() > 0


def assert_exact(small_fn, small_params, expected, x, tolerance=1e-5):
    """Compare with the masked output of a batch, at its size and at another one."""
    for batch in (len(x), 2):
        actual = run(small_fn, small_params, x[:batch])
        error = relative_error(actual, expected[:batch])
        assert error < tolerance, f"relative error {error:.1e} at batch size {batch}"


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def shapes(tree):
    """Return the shapes of the leaves by path."""
    return {path: leaf.shape for path, leaf in named_leaves(tree).items()}


def groups_of(fn, params, x):
    """Return the report on the channels of a bare function."""
    return compaction.channel_groups(fn, x, params=params)


def random_channels(rng, report, fractions):
    """Draw channels that are not pinned: dict from the name of a group to channels."""
    chosen = {}
    for group in report.groups:
        free = np.flatnonzero(group.removable)
        n = round(rng.choice(fractions) * len(free))
        if n:
            chosen[group.name] = sorted(rng.choice(free, n, replace=False).tolist())
    return chosen


def without(report, chosen, full):
    """Return the shapes that are left when the chosen channels have gone.

    Where groups share an axis, as heads and their dimensions do, an index goes when it
    goes in one of them.
    """
    gone = {(p, i): np.zeros(n, bool) for p, s in full.items() for i, n in enumerate(s)}
    for group in report.groups:
        for member in group.members:
            dead = np.isin(member.channels, chosen.get(group.name, []))
            gone[member.path, member.axis] |= dead
    return {
        path: tuple(int((~gone[path, i]).sum()) for i in range(len(shape)))
        for path, shape in full.items()
    }
