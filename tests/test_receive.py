"""What a host does with files that are pushed to it: nothing half, nothing rotten, nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import receive
from deploy.receive import INCOMING, check, place


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


ROOTS = {
    "cache/packages/net-1": {"a.json": _hash("a"), "sub/b.bin": _hash("b")},
    "cache/pushed/ab.csv": {"": _hash("c")},
}
TEXTS = {"cache/packages/net-1/a.json": "a", "cache/packages/net-1/sub/b.bin": "b"}
TEXTS |= {"cache/pushed/ab.csv": "c"}


def _copy(base: Path, paths: list[str]) -> None:
    for path in paths:
        target = base / INCOMING / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(TEXTS[path])


@pytest.fixture
def pushed(tmp_path: Path) -> Path:
    _copy(tmp_path, check(tmp_path, ROOTS)["lacking"])
    assert place(tmp_path, ROOTS) == {"lacking": []}
    return tmp_path


def test_everything_is_lacking_at_first_and_nothing_afterwards(tmp_path: Path) -> None:
    found = check(tmp_path, ROOTS)
    assert found["lacking"] == list(TEXTS)
    assert found["free"] > 0
    _copy(tmp_path, found["lacking"])
    assert check(tmp_path, ROOTS)["lacking"] == []
    assert check(tmp_path, ROOTS)["open"] == list(ROOTS)
    assert not (tmp_path / "cache").exists()
    came = (tmp_path / INCOMING / "cache/packages/net-1").stat().st_ino
    place(tmp_path, ROOTS)
    whole = tmp_path / "cache/packages/net-1"
    assert whole.stat().st_ino == came  # in one move, so nobody sees half of it
    assert {p: (tmp_path / p).read_text() for p in TEXTS} == TEXTS
    assert not (tmp_path / INCOMING).exists()
    assert check(tmp_path, ROOTS) | {"free": 0} == {"lacking": [], "open": [], "free": 0}


def test_a_root_of_which_a_file_is_missing_does_not_appear(tmp_path: Path) -> None:
    _copy(tmp_path, list(TEXTS)[1:])
    assert place(tmp_path, ROOTS) == {"lacking": ["cache/packages/net-1/a.json"]}
    assert not (tmp_path / "cache/packages/net-1").exists()
    assert (tmp_path / "cache/pushed/ab.csv").exists()
    assert check(tmp_path, ROOTS)["lacking"] == ["cache/packages/net-1/a.json"]


def test_a_copy_with_another_content_is_not_put_in_place(tmp_path: Path) -> None:
    _copy(tmp_path, list(TEXTS))
    (tmp_path / INCOMING / "cache/pushed/ab.csv").write_text("C")
    assert place(tmp_path, ROOTS) == {"lacking": ["cache/pushed/ab.csv"]}
    assert not (tmp_path / "cache/pushed/ab.csv").exists()


def test_a_file_that_rotted_is_copied_again_though_size_and_time_are_as_before(
    pushed: Path,
) -> None:
    path = pushed / "cache/packages/net-1/sub/b.bin"
    os.utime(path, (1, 1))
    path.write_text("B")
    os.utime(path, (1, 1))
    found = check(pushed, ROOTS)
    assert found["lacking"] == ["cache/packages/net-1/sub/b.bin"]
    assert found["open"] == ["cache/packages/net-1"]
    _copy(pushed, found["lacking"])
    os.utime(pushed / INCOMING / found["lacking"][0], (1, 1))  # as rsync sets it
    assert place(pushed, ROOTS) == {"lacking": []}
    assert path.read_text() == "b"
    assert path.stat().st_mtime > 1  # so that what was converted from it is converted again


def test_what_a_root_no_longer_has_is_removed_and_other_roots_stay(pushed: Path) -> None:
    fewer = {"cache/packages/net-1": {"a.json": _hash("a")}}
    found = check(pushed, fewer)
    assert (found["lacking"], found["open"]) == ([], list(fewer))
    place(pushed, fewer)
    assert not (pushed / "cache/packages/net-1/sub/b.bin").exists()
    assert (pushed / "cache/pushed/ab.csv").exists()


def test_the_list_of_hashes_is_one_that_sha256sum_reads(pushed: Path) -> None:
    for name, folder in (("net-1", "cache/packages"), ("ab.csv", "cache/pushed")):
        command = ["sha256sum", "--check", "--quiet", f"{name}.sha256"]
        assert subprocess.run(command, cwd=pushed / folder, check=False).returncode == 0
        victim = next(p for p in (pushed / folder).rglob("*") if p.suffix in (".json", ".csv"))
        victim.write_text("x")
        done = subprocess.run(command, cwd=pushed / folder, check=False, capture_output=True)
        assert done.returncode == 1


def test_its_text_alone_does_it_in_another_process(tmp_path: Path) -> None:
    order = {"do": "check", "base": str(tmp_path / "new"), "roots": ROOTS}
    text = Path(receive.__file__).read_text()
    done = subprocess.run(
        [sys.executable, "-I", "-c", text],
        input=json.dumps(order).encode(),
        check=True,
        capture_output=True,
    )
    assert json.loads(done.stdout)["lacking"] == list(TEXTS)
