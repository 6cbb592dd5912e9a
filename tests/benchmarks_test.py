"""The pages of benchmarks say how they were made."""

import json
import sys

import jax

from benchmarks import pages


def test_a_page_and_its_figures(tmp_path, monkeypatch, capsys):
    argv = ["anywhere/speed.py", "--peer", "/some/where", "--rounds", "3"]
    monkeypatch.setattr(sys, "argv", argv)
    folder = tmp_path / "new" / "results"
    pages.publish(
        "speed",
        "A table.",
        {"rows": [1.5]},
        folder,
        title="Speed",
        packages=["optax"],
        hidden="/some/where",
    )
    title, made, text = (folder / "speed.md").read_text().strip().split("\n\n")
    assert (title, text) == ("# Speed", "A table.")
    command = "python benchmarks/speed.py --peer PATH --rounds 3"
    assert made.startswith(f"Made by `{command}`: jax {jax.__version__}, optax ")
    figures = json.loads((folder / "speed.json").read_text())
    assert figures["rows"] == [1.5] and figures["machine"]["backend"] == "cpu"
    assert sorted(path.name for path in folder.iterdir()) == ["speed.json", "speed.md"]
    assert "A table." in capsys.readouterr().out

    pages.publish("other", "Words.", {}, None)
    assert "Words." in capsys.readouterr().out
    assert not (folder / "other.md").exists()
