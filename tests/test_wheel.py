"""The wheel that is pushed to hosts is the one that the build backend makes of the checkout."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from deploy import wheel

ROOT = Path(__file__).parent.parent
INFO = f"seedwire-{metadata.version('seedwire')}.dist-info"


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel.build(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def backends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy: setuptools leaves its work in the tree."""
    tree = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],  # noqa: S607
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, check=True, capture_output=True, text=True
    )
    return tree / "dist" / done.stdout.splitlines()[-1]


def _names(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return {name for name in archive.namelist() if not name.startswith(INFO)}


def _requires(path: Path) -> set[tuple[str, str]]:
    with zipfile.ZipFile(path) as archive:
        message = Parser().parsestr(archive.read(f"{INFO}/METADATA").decode())
    wanted = map(Requirement, message.get_all("Requires-Dist", []))
    return {(f"{r.name}{r.specifier}{sorted(r.extras)}", str(r.marker)) for r in wanted}


def test_it_has_the_files_that_the_backend_packs_and_what_it_asks_for(
    ours: Path, backends: Path
) -> None:
    assert ours.name == backends.name
    assert _names(ours) == _names(backends)
    assert _requires(ours) == _requires(backends)


def test_the_same_files_give_the_same_bytes(ours: Path, tmp_path: Path) -> None:
    assert wheel.build(tmp_path).read_bytes() == ours.read_bytes()


def test_pip_installs_it_and_finds_every_file_as_recorded(ours: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(ours)], check=True)
    for name, hash_ in wheel.installed(ours).items():
        assert hashlib.sha256((target / name).read_bytes()).hexdigest() == hash_, name
    code = "import node.forward, sys; assert sys.argv[1] in node.forward.__file__"
    env = {"PYTHONPATH": str(target), "PATH": os.environ["PATH"]}
    subprocess.run([sys.executable, "-c", code, str(target)], check=True, env=env, cwd=tmp_path)
    (found,) = metadata.distributions(path=[str(target)])
    assert [point.value for point in found.entry_points] == ["seedwire:main"]


def test_an_installation_from_a_wheel_packs_itself_again(ours: Path, tmp_path: Path) -> None:
    """No checkout is near: what is installed is enough, and gives the same wheel."""
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(ours)], check=True)
    code = "import sys; from pathlib import Path; from deploy import wheel; wheel.build(Path('.'))"
    env = {"PYTHONPATH": str(target), "PATH": os.environ["PATH"]}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=tmp_path)
    assert (tmp_path / ours.name).read_bytes() == ours.read_bytes()
