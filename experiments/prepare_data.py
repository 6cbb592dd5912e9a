"""Prepare a dataset once, or check one that is there.

    export SPARSEJAX_DATA_DIR=DIR
    python experiments/prepare_data.py --name=cifar100
    python experiments/prepare_data.py --name=tiny_imagenet --images=FOLDER
    python experiments/prepare_data.py --name=imagenet2012 --check

The first needs TensorFlow and a network. (imagenet2012 needs its two archives beside,
which come with an account at image-net.org: tfds says where to put them.) The second
takes any FOLDER/SPLIT/CLASS/ of JPEG or PNG files and needs neither. The third reads,
and ends with code 1 where something is wrong. The first two end with such a check.
"""

import pathlib
import sys

from absl import app, flags, logging

# A script finds its own folder first; the modules are named from the repository root.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from configs import base  # noqa: E402
from experiments.data import prepare, sources  # noqa: E402

_NAME = flags.DEFINE_string("name", None, "Name of the dataset.", required=True)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", "", "Folder of all tfds datasets; empty: SPARSEJAX_DATA_DIR."
)
_IMAGES = flags.DEFINE_string(
    "images", None, "Folder of images SPLIT/CLASS/... to make a dataset of."
)
_CHECK = flags.DEFINE_bool("check", False, "Check a dataset that is prepared.")
_SAMPLE = flags.DEFINE_integer(
    "sample", 1000, "Images of a split that --check decodes; 0: all.", lower_bound=0
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"These arguments are not flags: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    try:
        sys.exit(run())
    except ValueError as error:
        sys.exit(str(error))


def run() -> int:
    """Do what the flags say; return 1 where a check finds something wrong."""
    name = _NAME.value
    folder = sources.folder_of(base.Data(name, _DATA_DIR.value))
    if not _CHECK.value and _IMAGES.value:
        prepare.from_folder(_IMAGES.value, name, folder)
    elif not _CHECK.value:
        prepare.with_tfds(name, folder)
    wrong = 0
    for line in prepare.check(name, folder, _SAMPLE.value):
        print(line)
        wrong |= line.startswith("WRONG")
    return int(wrong)


if __name__ == "__main__":
    app.run(main)
