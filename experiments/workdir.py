"""The folder of a run: it belongs to one config, and no run writes into another's."""

import dataclasses
import json
import os
import pathlib
from typing import Any

from configs import base
from experiments.files import replaced

CONFIG_NAME = "config.json"


def claim(
    workdir: str | os.PathLike, config: Any, *, write: bool = True
) -> pathlib.Path:
    """Make `workdir` the folder of `config`, or find that it is.

    Fields that `configs.base.MAY_CHANGE` marks may differ: they are written down, and
    say how a run was begun.

    Args:
      workdir: a folder; it and its parents are made where they are missing.
      config: a dataclass.
      write: False in all processes but one.

    Returns:
      The folder as an absolute path.

    Raises:
      ValueError: where the folder holds a run of another config, or a run without
        its config, or is an address. Nothing is written then.
    """
    if "://" in os.fspath(workdir):
        raise ValueError(
            "workdir must be a folder that all processes see, such as a shared disk or "
            f"a bucket mounted with gcsfuse, got {workdir!r}; mount it and pass its "
            "path."
        )
    folder = pathlib.Path(workdir).expanduser().resolve()
    path = folder / CONFIG_NAME
    # Through JSON, so that tuples and lists compare equal.
    ours = json.loads(json.dumps(dataclasses.asdict(config)))
    if path.exists():
        theirs = json.loads(path.read_text())
        for saved in (theirs, ours):
            _forget_free(saved, config)
        differences = _differences(theirs, ours)
        if differences:
            raise ValueError(
                f"{folder} holds a run of another config; nothing was changed. It "
                "differs in (there -> here):\n"
                + "\n".join(f"  config.{line}" for line in differences)
                + "\nGo on with that config, or choose another --workdir."
            )
        return folder
    if any((folder / name).exists() for name in ("checkpoints", "metrics.jsonl")):
        raise ValueError(
            f"{folder} holds checkpoints or metrics, but no {CONFIG_NAME} that says "
            "which run they are of; nothing was changed. Choose another --workdir."
        )
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        with replaced(path) as file:
            file.write(json.dumps(ours, indent=2) + "\n")
    return folder


def _forget_free(saved: dict[str, Any], config: Any) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if base.MAY_CHANGE.items() <= field.metadata.items():
            saved.pop(field.name, None)
        elif dataclasses.is_dataclass(value) and isinstance(
            saved.get(field.name), dict
        ):
            _forget_free(saved[field.name], value)


def _differences(theirs: Any, ours: Any, path: str = "") -> list[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return [
            line
            for name in sorted({*theirs, *ours})
            for line in _differences(
                theirs.get(name, "(absent)"),
                ours.get(name, "(absent)"),
                f"{path}.{name}" if path else name,
            )
        ]
    return [] if theirs == ours else [f"{path}: {theirs!r} -> {ours!r}"]
