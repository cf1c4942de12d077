"""What ``scripts/wheels.py`` makes of a resolution; the index itself is asked by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import toml

from scripts import wheels
from scripts.wheels import Lock, Package, Wheel, faults, table

LOCK = """
[[packages]]
name = "torch"
version = "2.10.0"
wheels = [{ url = "https://x/0c/torch-2.10.0-cp311-cp311-manylinux_2_28_aarch64.whl", hashes = {} }]
[[packages]]
name = "idna"
version = "3.20"
wheels = [{ url = "https://x/aa/idna-3.20-py3-none-any.whl" }]
"""


def _package(name: str, version: str = "1.0", tags: str = "py3-none-any") -> Package:
    return Package(name, version, [Wheel(f"https://x/{name}-{version}-{tags}.whl")])


def test_a_lock_is_a_row_for_what_is_compiled_and_a_name_for_the_rest() -> None:
    found = toml.decode(LOCK, type=Lock).packages
    head, _, row, _, pure = table({"Pi": found, "Jetson": [found[1]]}).splitlines()
    assert head == "| package | Pi | Jetson |"
    assert row == "| torch | 2.10.0, cp311 manylinux_2_28_aarch64 | - |"
    assert pure == "Pure Python: idna."
    assert list(faults(found)) == []


def test_what_a_board_cannot_install_is_a_fault() -> None:
    sdist = Package("tokenizers", "0.1", [])
    held = [_package("numpy", "1.26.4"), _package("grpcio"), sdist, _package("numpy", "2.0")]
    assert list(faults(held)) == [
        "numpy is held at 1.26.4",
        "grpcio is needed",
        "tokenizers 0.1 has no wheel",
    ]


def test_a_lack_is_the_exit_code_and_the_table_is_in_the_page_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{wheels.BEGIN}old\n{wheels.END}\nafter\n")
    answers = {"Pi": [_package("grpcio", tags="cp311-cp311-linux_aarch64")], "Orin": "no torch"}
    monkeypatch.setattr(wheels, "BOARDS", {name: name for name in answers})
    monkeypatch.setattr(wheels, "resolve", lambda name: answers[name])
    monkeypatch.setattr("sys.argv", ["wheels.py", "--write", str(page)])
    with pytest.raises(SystemExit, match="Pi: grpcio is needed\nOrin: no torch"):
        wheels.main()
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{wheels.END}\nafter\n")
    assert "| grpcio | 1.0, cp311 linux_aarch64 |" in text
    assert "old" not in text
