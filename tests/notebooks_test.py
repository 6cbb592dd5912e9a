"""What is committed of a notebook; `make notebooks` executes them."""

import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_in_colab_and_has_no_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    address = "https://colab.research.google.com/github/sparsejax/sparsejax/blob/main"
    assert f"({address}/notebooks/{path.name})" in "".join(cells[0]["source"])
    for cell in cells:
        assert not cell.get("outputs") and not cell.get("execution_count")
