"""The flags that comparisons of kept runs share."""

import pathlib
import shlex
import sys

from absl import app, flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", help_string="File of the recipe.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs.", required=True)
OUT = flags.DEFINE_string("out", None, "The results' path, no suffix.", required=True)
SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds.", lower_bound=2)
SHARD = flags.DEFINE_string("shard", None, "I/N: train only this part of the runs.")
flags.mark_flag_as_required("config")


def check_no_others(argv: list[str]) -> None:
    """Raise UsageError where something stands on the command line that is no flag."""
    if len(argv) > 1:
        raise app.UsageError(f"These arguments are not flags: {argv[1:]}")


def command() -> str:
    """Return the command that runs this program, from the root of the repository."""
    script = pathlib.Path(sys.argv[0]).name
    return shlex.join(["python", f"experiments/{script}", *sys.argv[1:]])
