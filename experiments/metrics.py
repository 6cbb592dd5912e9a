"""Metrics of a run: `metrics.jsonl`, and TensorBoard files beside it.

Every line of `metrics.jsonl` is one JSON object, `step` and named metrics, and every
step has one line. The lines hold nothing that two runs of one config may differ in;
what the clock says goes to TensorBoard alone.
"""

import json
import os
import pathlib
from collections.abc import Mapping

import tensorboardX

from experiments.files import replaced

FILE_NAME = "metrics.jsonl"

Record = dict[str, float]


class Writer:
    """Append metrics to the files of a run, and to nothing where `enabled` is False.

    Use it as a context manager. On a run that goes on from a checkpoint it first
    forgets what was written after that step.

    Args:
      workdir: an existing folder.
      resume_after: the step that the run goes on from, 0 for a new one.
      enabled: True in the one process that writes.
    """

    def __init__(
        self, workdir: pathlib.Path, resume_after: int = 0, *, enabled: bool = True
    ):
        self._file = self._board = None
        if enabled:
            path = workdir / FILE_NAME
            forget_after(path, resume_after)
            self._file = path.open("a")
            self._board = tensorboardX.SummaryWriter(
                str(workdir / "tensorboard"),
                purge_step=resume_after + 1 if resume_after else None,
                filename_suffix=f".after_{resume_after}",
            )

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, record: Record, *, clock: Mapping[str, float] = {}) -> None:
        """Write the metrics of a step, on the disk when this returns.

        Args:
          record: `step`, larger than in any call before, and metrics that the config
            determines.
          clock: metrics that depend on the machine, for TensorBoard alone.
        """
        if self._file is None or self._board is None:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        for name, value in {**record, **clock}.items():
            if name != "step":
                self._board.add_scalar(name, value, int(record["step"]))


def read(workdir: pathlib.Path) -> list[Record]:
    """Return the lines of a run in order, each with its `step`."""
    with (workdir / FILE_NAME).open() as file:
        return [json.loads(line) for line in file]


def forget_after(path: pathlib.Path, step: int) -> None:
    """Remove every line after `step`, and a last one that was cut off, atomically.

    Args:
      path: a `metrics.jsonl`, which need not exist.
      step: the last step to keep.
    """
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [
        line
        for line in lines
        if line.endswith("\n") and json.loads(line)["step"] <= step
    ]
    if kept != lines:
        with replaced(path) as file:
            file.writelines(kept)
