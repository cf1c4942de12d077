"""The import graph is the architecture; this test is its drawing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT: dict[str, set[str]] = {
    "protocol": set(),
    "fedalgos": {"protocol"},
    "coordinator": {"protocol", "fedalgos"},
    "node": {"protocol", "fedalgos"},
    "deploy": set(),
}
OURS = {*MAY_IMPORT, "benchmarks", "scripts", "seedwire", "tests"}
PURE = sorted(
    name
    for name in (
        *(
            f"protocol/{m}.py"
            for m in (
                *("wire", "messages", "specs", "payload", "noise", "blobs"),
                *("places", "values", "picks"),
            )
        ),
        *(f"fedalgos/{p.name}" for p in (ROOT / "fedalgos").glob("*.py")),
        "coordinator/rounds.py",
        "coordinator/state.py",
        "coordinator/cohort.py",
        "coordinator/deadline.py",
        *(f"coordinator/{m}.py" for m in ("budget", "checks", "norms", "oom")),
    )
    if (ROOT / name).exists()
)
EFFECTS = {"time", "datetime", "socket", "zmq", "asyncio", "threading", "logging", "os", "random"}
EFFECTS |= {"torch", "secrets", "subprocess", "multiprocessing", "selectors", "queue"}
WITHOUT_TORCH = ("coordinator", "protocol", "fedalgos")
TORCH = {"torch", "transformers", "peft", "safetensors", "datasets", "flwr_datasets"}


def imports(path: Path) -> set[str]:
    """The top-level names that a module imports, wherever in it."""
    tree = ast.parse(path.read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom):
            assert n.level == 0, f"{path}: a relative import hides where it goes"
            names.add(n.module or "")
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_the_architecture_allows(package: str) -> None:
    paths = list((ROOT / package).rglob("*.py"))
    assert paths
    for path in paths:
        assert imports(path) & (OURS - {package}) <= MAY_IMPORT[package], path


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_import_no_effects(name: str) -> None:
    assert not imports(ROOT / name) & EFFECTS


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_draw_from_no_generator_but_the_stream(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text())
    attributes = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert not attributes & {"random", "default_rng", "manual_seed"}


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_what_the_coordinator_loads_never_imports_torch(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        assert not imports(path) & TORCH, path


def test_a_coordinator_runs_without_torch() -> None:
    code = (
        "import sys, seedwire, coordinator.run, node.session\n"
        "sys.exit(any(m.split('.')[0] in ('torch', 'transformers') for m in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
