"""A probe of compaction: what stands between two layers, of which one is half masked.

fc1 has 16 outputs of which half are masked; the probed function takes them.
"""

import inspect
import pathlib
import re

import jax
import numpy as np
from compaction_checks import depends_on_input, relative_error, run

from sparsejax import compaction

CHANNELS = 16
DEAD = [1, 2, 3, 6, 8, 10, 11, 15]
ALIVE = [i for i in range(CHANNELS) if i not in DEAD]
ORDER = np.random.default_rng(5).permutation(CHANNELS).astype(np.int32)
WEIGHTS = np.random.default_rng(6).normal(size=CHANNELS).astype(np.float32)
X = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)


def fc1(params, x):
    return x @ params["fc1"]["kernel"] + params["fc1"]["bias"][None]


def probe(middle):
    """Return fc1, the function and fc2 as one function, and its masked parameters."""
    rng = np.random.default_rng(1)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    first = {"kernel": normal(5, CHANNELS), "bias": normal(CHANNELS)}
    hidden = jax.eval_shape(lambda p, x: middle(fc1(p, x)), {"fc1": first}, X)
    assert hidden.shape[0] == len(X) and len(hidden.shape) == 2
    first["kernel"][:, DEAD] = 0
    first["bias"][DEAD] = 0
    params = {"fc1": first, "fc2": {"kernel": normal(hidden.shape[-1], 3)}}
    return lambda p, x: middle(fc1(p, x)) @ p["fc2"]["kernel"], params


def hidden_left(params):
    """Return how many hidden channels are left."""
    assert params["fc1"]["kernel"].shape[1] == params["fc1"]["bias"].shape[0]
    return params["fc1"]["bias"].shape[0]


def compacted(fn, params, x=X, **options):
    """Compact a function, and require that it computes the same.

    At the analysed batch size and at another; what a function makes of an example may
    depend on the others.
    """
    small_fn, small, report = compaction.compact_fn(
        fn, params, x, verify=False, **options
    )
    for batch in (x, x[:2]):
        expected = run(fn, params, batch)
        assert depends_on_input(expected)
        error = relative_error(run(small_fn, small, batch), expected)
        assert error < 2e-5, f"relative error {error:.1e}"
    return small, report


def assert_says_where(error, middle, primitive=None):
    """Require the parameter path, its axis, the primitive and its line in the case."""
    inside = jax.make_jaxpr(middle)(jax.ShapeDtypeStruct((6, CHANNELS), np.float32))
    source, start = inspect.getsourcelines(middle)
    file, lines = pathlib.Path(inspect.getfile(middle)).name, range(len(source))
    text = str(error)
    assert re.search(r"\d+ of \d+ .*channels of fc1/\w+ axis \d", text), text
    named = re.search(r"'([\w-]+)' \((?:\S*/)?(\w+\.py):(\d+)", text)
    assert named, f"no primitive with its source line in: {text}"
    assert named[1] in ({primitive} if primitive else primitives(inside.jaxpr)), text
    assert named[2] == file and int(named[3]) - start in lines, text
    assert 'on_unknown="pin"' in text, text


def primitives(jaxpr):
    """Return the names of the primitives of a jaxpr and of all within."""
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        for value in jax.tree.leaves([*equation.params.values()], is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                names |= primitives(getattr(value, "jaxpr", value))
    return names


def _is_jaxpr(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")
