"""What a benchmark found, as a page and as figures, with where and how it was made."""

import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from experiments.files import replaced


def publish(
    name: str,
    text: str,
    figures: Mapping[str, Any],
    folder: pathlib.Path | None,
    *,
    title: str = "",
    packages: Sequence[str] = (),
    hidden: str | None = None,
) -> None:
    """Print a page, and write it as NAME.md and its figures as NAME.json.

    Args:
      name: of the files.
      text: Markdown.
      figures: what can be written as JSON; "machine" is added.
      folder: for the files, made if it is missing; None: none is written.
      title: of the page.
      packages: whose versions matter, besides jax.
      hidden: an argument of the command that is a path of this machine.
    """
    machine = {
        **{
            package: importlib.metadata.version(package)
            for package in ("jax", *packages)
        },
        "backend": jax.default_backend(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    facts = ", ".join(f"{key} {value}" for key, value in machine.items())
    print(f"\n{text}\n\n{facts}")
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    script = f"benchmarks/{pathlib.Path(sys.argv[0]).name}"
    arguments = ["PATH" if own == hidden else own for own in sys.argv[1:]]
    heading = f"# {title}\n\n" if title else ""
    made = f"Made by `{shlex.join(['python', script, *arguments])}`: {facts}."
    with replaced(folder / f"{name}.md") as file:
        file.write(f"{heading}{made}\n\n{text}\n")
    with replaced(folder / f"{name}.json") as file:
        file.write(json.dumps({"machine": machine, **figures}, indent=1) + "\n")
