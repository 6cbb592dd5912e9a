"""What sparse training costs: masks drawn, masks updated, and the steps between.

    python benchmarks/mask_update.py [--peer PATH_TO_JAXPRUNER] [--out results]

All on one tree, the parameters of ResNet-50, 25.6 million of them, under SGD with
momentum at 80 % sparsity, and in one process: every step is compiled ahead, warmed, and
timed in turn with the others, so that a ratio compares what the same machine did in the
same minute. Medians are given. An update is timed as a whole step on which masks
change, the optimizer's work included. Chase removes channels in the same step, from
within the blocks.

Tables are called ``mask_update``, and ``mask_update_alone`` without a peer. With
``--peer``, the same for a checkout of google-research/jaxpruner, whose update is
timed alone, without the step that it is part of. It calls `jax.tree_map`, which no
longer exists; it is put back as it was.
"""

import argparse
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

# A script finds its own folder first; the modules are named from the repository root.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks import pages  # noqa: E402
from sparsejax import sparse_optax  # noqa: E402

SPARSITY = 0.8
NEVER = 10**9


class Program(NamedTuple):
    """A compiled step and the state that it works on."""

    run: Callable[..., Any]
    state: Any
    facts: dict[str, float]


def resnet50(rng: np.random.Generator, scale: float) -> dict[str, dict[str, jax.Array]]:
    """Return random parameters in the shapes of ResNet-50 for ImageNet."""
    params = {}

    def add(name, **shapes):
        draw = lambda shape: jnp.asarray(rng.standard_normal(shape, np.float32) * scale)
        params[name] = {leaf: draw(shape) for leaf, shape in shapes.items()}

    def conv(name, size, n_in, n_out):
        add(name, kernel=(size, size, n_in, n_out))
        add(f"{name}_bn", scale=(n_out,), bias=(n_out,))

    conv("stem", 7, 3, 64)
    n_in = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            name = f"stage{stage}_block{block}"
            conv(f"{name}_conv1", 1, n_in, width)
            conv(f"{name}_conv2", 3, width, width)
            conv(f"{name}_conv3", 1, width, 4 * width)
            if block == 0:
                conv(f"{name}_projection", 1, n_in, 4 * width)
            n_in = 4 * width
    add("head", kernel=(2048, 1000), bias=(1000,))
    return params


def block_channels() -> list[Any]:
    """Return the channels within the blocks, as `compaction.channel_groups` does."""

    def member(path, axis, role, size):
        indices = np.arange(size)
        return SimpleNamespace(path=path, axis=axis, role=role, channels=indices)

    found = []
    for stage, blocks in enumerate((3, 4, 6, 3)):
        size = 64 * 2**stage
        for block in range(blocks):
            for i in (1, 2):
                name = f"stage{stage}_block{block}_conv"
                places = (
                    (f"{name}{i}/kernel", 3, "producer"),
                    (f"{name}{i}_bn/scale", 0, "norm"),
                    (f"{name}{i}_bn/bias", 0, "norm"),
                    (f"{name}{i + 1}/kernel", 2, "consumer"),
                )
                group = SimpleNamespace(
                    name=f"{name}{i}",
                    size=size,
                    members=[member(*place, size) for place in places],
                    removable=np.ones(size, bool),
                    pinned=None,
                )
                found.append(group)
    return found


def transformations(*, every_step: bool) -> dict[str, optax.GradientTransformation]:
    """Return what is measured; masks change at every step but the first, or never."""
    inner = optax.sgd(0.1, momentum=0.9)
    growing = {"update_every": 1} if every_step else {"start_at": NEVER}
    pruning = growing | {"stop_at": 1000 if every_step else 2 * NEVER}
    removing = {"channel_sparsity": 0.3, "groups": block_channels()}
    removing |= pruning | {"remove_every": 1}
    make = {
        "rigl": lambda: sparse_optax.rigl(inner, sparsity=SPARSITY, **growing),
        "set": lambda: sparse_optax.set(inner, sparsity=SPARSITY, **growing),
        "srigl": lambda: sparse_optax.srigl(inner, sparsity=SPARSITY, **growing),
        "chase": lambda: sparse_optax.chase(inner, sparsity=SPARSITY, **removing),
        "magnitude": lambda: sparse_optax.magnitude(
            inner, sparsity=SPARSITY, **pruning
        ),
        "global magnitude": lambda: sparse_optax.magnitude(
            inner, sparsity=SPARSITY, scope="global", **pruning
        ),
    }
    if not every_step:
        static = lambda: sparse_optax.static(inner, sparsity=SPARSITY)
        make = {"dense": lambda: inner, "static": static} | make
    return {name: build() for name, build in make.items()}


def build(tx, params, grads) -> Program:
    """Initialise and compile one step of ``tx``; its buffers are donated."""
    begin = time.perf_counter()
    opt_state = jax.block_until_ready(tx.init(params))
    drawn = time.perf_counter()

    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, grads)
    traced = time.perf_counter()
    compiled = lowered.compile()
    facts = {
        "init s": drawn - begin,
        "trace s": traced - drawn,
        "compile s": time.perf_counter() - traced,
        "temporary MB": compiled.memory_analysis().temp_size_in_bytes / 1e6,
    }
    return Program(lambda state: compiled(*state, grads), (params, opt_state), facts)


def time_in_turn(programs: dict[str, Program], rounds: int, repeats: int):
    """Run the programs in turn; return milliseconds of each run by name."""
    times = {name: [] for name in programs}
    states = {name: program.run(program.state) for name, program in programs.items()}
    for _ in range(rounds):
        for name, program in programs.items():
            for _ in range(repeats):
                begin = time.perf_counter()
                states[name] = jax.block_until_ready(program.run(states[name]))
                times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Measure this library; return the figures by algorithm."""
    grads = resnet50(np.random.default_rng(1), 1e-3)
    fresh = lambda: resnet50(np.random.default_rng(0), 0.05)
    idle = {
        name: build(tx, fresh(), grads)
        for name, tx in transformations(every_step=False).items()
    }
    rows = {name: dict(program.facts) for name, program in idle.items()}
    times = time_in_turn(idle, rounds, 4)
    dense = statistics.median(times["dense"])
    for name, values in times.items():
        rows[name]["step ms"] = statistics.median(values)
        rows[name]["step / dense"] = statistics.median(values) / dense
    del idle
    updates = {
        name: build(tx, fresh(), grads)
        for name, tx in transformations(every_step=True).items()
    }
    times = time_in_turn(updates, rounds, 1)
    rigl = statistics.median(times["rigl"])
    for name, values in times.items():
        rows[name]["update ms"] = statistics.median(values)
        rows[name]["update / rigl"] = statistics.median(values) / rigl
    return rows


def measure_peer(path: str, rounds: int) -> dict[str, dict[str, float]]:
    """Measure jaxpruner in the same way."""

    def tree_map(f, tree, *rest, is_leaf=None):
        del is_leaf  # None in the first tree once matched anything
        leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: x is None)
        others = [treedef.flatten_up_to(other) for other in rest]
        mapped = [
            None if leaf is None else f(leaf, *(other[i] for other in others))
            for i, leaf in enumerate(leaves)
        ]
        return treedef.unflatten(mapped)

    jax.tree_map = tree_map  # pyright: ignore[reportAttributeAccessIssue]
    sys.path.insert(0, path)
    import functools

    import jaxpruner
    from jaxpruner import sparsity_distributions, sparsity_schedules

    share = functools.partial(sparsity_distributions.uniform, sparsity=SPARSITY)
    never = sparsity_schedules.PeriodicSchedule(
        update_freq=NEVER, update_start_step=1, update_end_step=2 * NEVER
    )
    common = {"sparsity_distribution_fn": share, "scheduler": never}
    updaters = {
        "static": jaxpruner.StaticRandomSparse(**common),
        "rigl": jaxpruner.RigL(**common),
        "set": jaxpruner.SET(**common),
        "magnitude": jaxpruner.MagnitudePruning(**common),
        "global magnitude": jaxpruner.GlobalMagnitudePruning(
            sparsity=SPARSITY, scheduler=never
        ),
    }
    params = resnet50(np.random.default_rng(0), 0.05)
    grads = resnet50(np.random.default_rng(1), 1e-3)
    copied = lambda tree: jax.tree.map(jnp.copy, tree)
    programs, rows = {}, {}
    for name, updater in updaters.items():
        tx = updater.wrap_optax(optax.sgd(0.1, momentum=0.9))
        begin = time.perf_counter()
        state = jax.tree.map(jnp.asarray, jax.block_until_ready(tx.init(params)))
        rows[name] = {"init s": time.perf_counter() - begin}

        def step(params, state, grads, tx=tx, updater=updater):
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return updater.post_gradient_update(params, state), state

        begin = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads)
        traced = time.perf_counter()
        compiled = lowered.compile()
        rows[name] |= {
            "trace s": traced - begin,
            "compile s": time.perf_counter() - traced,
            "temporary MB": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        }
        run = lambda s, compiled=compiled: compiled(*s, grads)
        programs[name] = Program(run, (copied(params), copied(state)), {})
        if name != "static":
            update = jax.jit(updater.update_state).lower(state, params, grads).compile()
            update(state, params, grads)
            times = []
            for _ in range(max(3, rounds // 2)):
                begin = time.perf_counter()
                jax.block_until_ready(update(state, params, grads))
                times.append(1e3 * (time.perf_counter() - begin))
            rows[name]["update ms"] = statistics.median(times)
    dense = build(optax.sgd(0.1, momentum=0.9), copied(params), grads)
    times = time_in_turn({"dense": dense} | programs, rounds, 2)
    for name in programs:
        rows[name]["step ms"] = statistics.median(times[name])
        rows[name]["step / dense"] = rows[name]["step ms"] / statistics.median(
            times["dense"]
        )
    return rows


COLUMNS = (
    "step ms",
    "step / dense",
    "update ms",
    "update / rigl",
    "init s",
    "trace s",
    "compile s",
    "temporary MB",
)


def table(rows: dict[str, dict[str, float]], peer: dict[str, dict[str, float]]) -> str:
    """Return the figures as a Markdown table."""

    def line(name, row):
        cells = [f"{row[c]:.3g}" if c in row else "" for c in COLUMNS]
        return f"| {name} | " + " | ".join(cells) + " |"

    lines = [
        "| | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
        *(line(name, row) for name, row in rows.items()),
        *(line(f"jaxpruner {name}", row) for name, row in peer.items()),
    ]
    ratios = [
        f"{name} {peer[name]['update ms'] / row['update ms']:.0f}x"
        for name, row in rows.items()
        if "update ms" in row and name in peer
    ]
    if ratios:
        lines += ["", f"Updates, jaxpruner over sparsejax: {', '.join(ratios)}."]
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, and write it where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--peer", help="checkout of google-research/jaxpruner")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=pathlib.Path, help="folder for the table")
    args = parser.parse_args()
    rows = measure(args.rounds)
    peer = measure_peer(args.peer, args.rounds) if args.peer else {}
    pages.publish(
        "mask_update" if peer else "mask_update_alone",
        f"Medians; ResNet-50's parameters.\n\n{table(rows, peer)}",
        {"sparsejax": rows, "jaxpruner": peer},
        args.out,
        packages=["optax"],
        hidden=args.peer,
    )


if __name__ == "__main__":
    main()
