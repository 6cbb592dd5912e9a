"""Checkpoints of a run: written in the background, whole or not at all, never lost.

One holds the arrays of the state, masks and keys among them, and notes in JSON: the
position in the data, metrics that are not written yet, the best test result so far.
Nothing in it depends on the number of devices or processes that wrote it. Checksums of
the arrays are in it, too: storage may return other bits than it was given.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from experiments.metrics import Record
from sparsejax.masks.layout import named_leaves

FOLDER = "checkpoints"


class Notes(NamedTuple):
    """What a run remembers beside its arrays; all of it is JSON.

    Attributes:
      data: position of the iterator over training batches; None: at the start.
      history: metrics of the steps since the last line that was written.
      best: the evaluation with the highest test accuracy so far: its line, or empty.
    """

    data: Any = None
    history: Sequence[Record] = ()
    best: Mapping[str, float] = {}


class Checkpoints:
    """The checkpoints in the folder of a run; a context manager.

    Args:
      folder: of the run.
      keep: how many of the last ones stay, beside that of the best evaluation.
      clean_up: whether to remove what saves that were killed left behind.
    """

    def __init__(
        self, folder: pathlib.Path, *, keep: int | None = None, clean_up: bool = False
    ):
        self._folder = folder / FOLDER
        self._keep = keep
        self._open(clean_up)

    def _open(self, clean_up: bool = False) -> None:
        policies = ocp.training.preservation_policies
        latest = policies.LatestN(self._keep)
        # Those of an evaluation that was the best so far have metrics, and no others.
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["test/accuracy"],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        keep = policies.AnyPreservationPolicy([latest, best])
        self._manager = ocp.training.Checkpointer(
            str(self._folder),
            preservation_policy=keep,  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=clean_up,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self._manager.close()

    @property
    def _infos(self) -> Sequence[Any]:
        return self._manager.checkpoints

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return [info.step for info in self._infos]

    def save(self, step: int, state: Any, notes: Notes) -> None:
        """Write a checkpoint in the background; one of the same step stays as it is."""
        if step in self.steps:
            return
        is_best = notes.best.get("step") == step
        beside: Any = {"notes": notes._asdict(), "checksums": checksums(state)}
        self._manager.save_checkpointables_async(
            step,
            {"state": state},
            force=True,
            metrics=dict(notes.best) if is_best else None,
            custom_metadata=beside,
        )

    def restore(
        self, abstract: Any, step: int | None = None
    ) -> tuple[int, Any, Notes] | None:
        """Read a checkpoint onto the devices that the abstract state names.

        Args:
          abstract: shapes, dtypes and shardings of the state.
          step: of the checkpoint; None: the last one.

        Returns:
          Its step, its state and its notes; None where there are no checkpoints.

        Raises:
          ValueError: where there is none of this step, it is damaged, or it is of
            another network or optimizer. The message names the last one that can be
            read. Nothing is changed.
        """
        if step is None and not self.steps:
            return None
        step = self.steps[-1] if step is None else step
        if step not in self.steps:
            raise ValueError(
                f"{self._folder} has no checkpoint of step {step}; it has those of "
                f"{', '.join(map(str, self.steps)) or 'no step'}."
            )
        try:
            return step, *self._read(step, abstract)
        except Exception as error:  # Storage and formats fail in many ways.
            raise ValueError(
                f"The checkpoint {self._folder / str(step)} cannot be restored: "
                f"{error}\nNothing was changed. {self._advice(step, abstract)}"
            ) from error

    @property
    def best(self) -> int | None:
        """The step with the highest test accuracy, None where nothing was tested."""
        tested = {c.metrics["test/accuracy"]: c.step for c in self._infos if c.metrics}
        return tested[max(tested)] if tested else None

    def set_aside_after(self, step: int) -> None:
        """Move later checkpoints out of the way, into a folder beside this one."""
        later = [s for s in self.steps if s > step]
        if not later:
            return
        self._manager.close()
        if jax.process_index() == 0:
            aside = self._folder.with_name(f"{FOLDER}_set_aside")
            aside.mkdir(exist_ok=True)
            for s in later:
                count = sum(1 for _ in aside.glob(f"{s}.*"))
                os.replace(self._folder / str(s), aside / f"{s}.{count}")
        multihost_utils.sync_global_devices("checkpoints are set aside")
        self._open()

    def _read(self, step: int, abstract: Any) -> tuple[Any, Notes]:
        metadata = self._manager.checkpointables_metadata(step)
        beside: Any = metadata.custom_metadata
        if not beside:
            raise ValueError("its metadata are gone.")
        _check_same(metadata.metadata["state"], abstract)
        state = self._manager.load_checkpointables(step, {"state": abstract})["state"]
        for path, found in checksums(state).items():
            if found != beside["checksums"][path]:
                raise ValueError(f"{path} is damaged: it has another checksum.")
        return state, Notes(**beside["notes"])

    def _advice(self, step: int, abstract: Any) -> str:
        for earlier in reversed([s for s in self.steps if s < step]):
            try:
                self._read(earlier, abstract)
            except Exception:
                continue
            return (
                f"That of step {earlier} is in order: go on from it with "
                f"--resume_from={earlier}, which moves later ones to "
                f"{FOLDER}_set_aside and deletes nothing."
            )
        return "No earlier one can be restored: choose another --workdir."


def checksums(state: Any) -> dict[str, int]:
    """Return the sum of the bits of each array as integers, the same on any mesh."""
    return {
        path: int(x) for path, x in named_leaves(jax.device_get(_sums(state))).items()
    }


@jax.jit
def _sums(state: Any) -> Any:
    def leaf(x):
        x = _without_key(x)
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
        return jnp.sum(x, dtype=jnp.uint32)

    return jax.tree.map(leaf, state)


def _without_key(x: jax.Array) -> jax.Array:
    """Return the integers of a PRNG key, as they are saved, and all else as it is."""
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if is_key else x


def _check_same(saved: Any, abstract: Any) -> None:
    """Raise ValueError unless a checkpoint has the arrays that are asked for."""
    asked_for = jax.tree.map(lambda x: jax.eval_shape(_without_key, x), abstract)
    theirs, ours = (
        named_leaves(getattr(saved, "pytree", saved)),
        named_leaves(asked_for),
    )
    for path in sorted({*theirs, *ours}):
        there, asked = (
            f"{tree[path].dtype}{list(tree[path].shape)}" if path in tree else "nothing"
            for tree in (theirs, ours)
        )
        if there != asked:
            raise ValueError(
                f"it belongs to another network, optimizer or algorithm: {path} must "
                f"be {asked}, and it has {there}."
            )
