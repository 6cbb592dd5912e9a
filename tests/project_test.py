"""The project's own rules: who imports whom, what is committed, what make offers."""

import ast
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Lowest first: a module may import what stands before it, and nothing after it.
PACKAGES = (
    "sparsejax._calls",
    "sparsejax.masks",
    "sparsejax.distributions",
    "sparsejax.schedules",
    "sparsejax._trees",
    "sparsejax._request",
    "sparsejax.sparse_optax",
    "sparsejax.saliency",
    "sparsejax.lottery",
    "sparsejax.recipes",
    "sparsejax.compaction",
    "sparsejax.serving",
    "sparsejax.analysis",
    "sparsejax.models",
)
MASKS = (
    "sparsejax.masks.selection",
    "sparsejax.masks.layout",
    "sparsejax.masks.initial",
    "sparsejax.masks.unstructured",
    "sparsejax.masks.fan_in",
    "sparsejax.masks.channels",
    "sparsejax.masks.patterns",
    "sparsejax.masks.patterned",
)
FORBIDDEN = {
    "sparsejax": ("benchmarks", "configs", "experiments"),
    "sparsejax.masks": ("flax", "optax", "orbax"),
    "sparsejax.compaction": ("sparsejax.sparse_optax",),
    "sparsejax.serving": ("sparsejax.sparse_optax",),
    "sparsejax.models": ("sparsejax.sparse_optax",),
}

MACHINE_PATH = re.compile(r"(?<![\w.~$}-])/(?:home|root|work|Users)/\w")

IMPORT_EVERYTHING = """
import importlib, json, pkgutil, sys
import chex, flax, jax, optax, orbax.checkpoint
before = set(sys.modules)
import sparsejax
names = [m.name for m in pkgutil.walk_packages(sparsejax.__path__, "sparsejax.")]
for name in names:
    importlib.import_module(name)
print(json.dumps({"imported": names, "new": sorted(set(sys.modules) - before)}))
"""


def _imports(source: str, package: str) -> set[str]:
    """List what a module of `package` imports, as absolute dotted names."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            parents = parents[: len(parents) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def _modules() -> Iterator[tuple[str, set[str]]]:
    """Yield the name and the imports of every module of the package."""
    for path in sorted((ROOT / "sparsejax").rglob("*.py")):
        package = ".".join(path.relative_to(ROOT).parent.parts)
        name = package if path.stem == "__init__" else f"{package}.{path.stem}"
        yield name, _imports(path.read_text(), package)


def _within(name: str, packages: Iterable[str]) -> str | None:
    """Return the one of `packages` that `name` is, or lies in."""
    return next((p for p in packages if f"{name}.".startswith(f"{p}.")), None)


def _upward(module: str, imports: set[str], order: tuple[str, ...]) -> list[str]:
    """List the imports of `module` that stand after it in `order`."""
    own = _within(module, order)
    if own is None:
        return []
    later = order[order.index(own) + 1 :]
    return [f"{module}: {name}" for name in sorted(imports) if _within(name, later)]


def _tracked_files() -> list[pathlib.Path]:
    """List the files that are committed, or would be by `git add .`."""
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip("needs git and a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    paths = {ROOT / name for name in listed.stdout.decode().split("\0") if name}
    return sorted(path for path in paths if path.is_file())


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import optax.tree", "optax.tree"),
        ("from sparsejax import models", "sparsejax.models"),
        ("from . import layout", "sparsejax.masks.layout"),
        ("from .layout import Layout", "sparsejax.masks.layout.Layout"),
        ("def f():\n  from ..models import MLP", "sparsejax.models.MLP"),
    ],
)
def test_imports_are_read_as_absolute_names(source, expected):
    assert _imports(source, "sparsejax.masks") == {expected}


def test_upward_import_is_found():
    imports = {"jax", "sparsejax.masks.top_k_mask", "sparsejax.models.MLP"}
    found = _upward("sparsejax.schedules", imports, PACKAGES)
    assert found == ["sparsejax.schedules: sparsejax.models.MLP"]


def test_every_module_has_a_place_in_the_order():
    names = [name for name, _ in _modules() if name != "sparsejax"]
    assert names
    assert [name for name in names if _within(name, PACKAGES) is None] == []


@pytest.mark.parametrize("order", [PACKAGES, MASKS], ids=["packages", "masks"])
def test_imports_run_one_way(order):
    found = [line for name, seen in _modules() for line in _upward(name, seen, order)]
    assert found == []


@pytest.mark.parametrize("package", FORBIDDEN)
def test_package_does_not_import(package):
    found = [
        f"{name}: {imported}"
        for name, imports in _modules()
        for imported in sorted(imports)
        if _within(name, [package]) and _within(imported, FORBIDDEN[package])
    ]
    assert found == []


def test_core_imports_no_experiment_dependency():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert "sparsejax.masks.selection" in seen["imported"]
    heavy = ("grain", "matplotlib", "sklearn", "tensorflow", "tensorflow_datasets")
    assert [name for name in seen["new"] if _within(name, heavy)] == []


@pytest.mark.parametrize("folder", ["home", "root", "work", "Users"])
@pytest.mark.parametrize("before", ["", '"', "file://", "--workdir=", "cd "])
def test_machine_path_is_found(before, folder):
    assert MACHINE_PATH.search("/".join([before, folder, "me"]))


@pytest.mark.parametrize("before", ["https://example.org", "~", "$HOME", "runs", "."])
def test_other_paths_are_no_machine_path(before):
    assert not MACHINE_PATH.search("/".join([before, "home", "me"]))


def test_no_tracked_file_names_a_path_of_one_machine():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in _tracked_files()
        for number, line in enumerate(path.read_text(errors="replace").split("\n"), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("help", "awk"),
        ("demo", "experiments/demo.py --workdir=runs/demo"),
        ("test", 'pytest -n 2 -m "not slow"'),
        ("test-all", "pytest -n 2"),
        ("bench", "benchmarks/mask_update.py"),
        ("bench-compaction", "benchmarks/compaction.py"),
        ("lint", "ruff format --check"),
        ("lint", "pyright"),
        ("notebooks", "pytest --nbmake notebooks/"),
    ],
)
def test_make_target_runs(target, command):
    # Under `make test` the outer make would hand its own flags to this one.
    env = {key: value for key, value in os.environ.items() if "MAKE" not in key}
    done = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert command in done.stdout
