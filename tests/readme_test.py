"""Every example of README.md runs by itself and prints what stands below it."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = list(
    re.finditer(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", README, re.S)
)


def heading(example):
    return re.findall(r"^#+ (.*)", README[: example.start()], re.M)[-1]


@pytest.mark.parametrize("example", EXAMPLES, ids=heading)
def test_example_prints_what_stands_below_it(example, capsys):
    code, printed = example.groups()
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == (printed or "")


def test_linked_files_exist():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert "LICENSE" in targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
