"""Files that are there whole, or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import IO, Any


@contextlib.contextmanager
def replaced(path: pathlib.Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a new file that takes the place of ``path`` when all is written.

    Where writing fails, or is killed, ``path`` stays what it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open(mode) as file:
        yield file
    os.replace(temporary, path)
