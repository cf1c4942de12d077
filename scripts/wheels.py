"""Whether a board can install Seedwire without a compiler: the wheels that the index has for it.

    python scripts/wheels.py                         # prints the table; exit code 1 on a lack
    python scripts/wheels.py --write docs/boards.md  # and puts it there

``uv`` resolves our dependencies, and theirs, as on the board: its Python, its machine, its glibc.
pip cannot be asked for that: ``pip download --platform`` takes the wheels of the other machine, but
evaluates the conditions of dependencies (``platform_machine == ...``) for the one that it runs on.
Nothing but metadata is downloaded.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from deploy.cargo import CUDA_PACKAGES

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- wheels: begin -->\n", "<!-- wheels: end -->"
UNWANTED = ("grpcio", "grpcio-tools")  # no wheel for some board, sooner or later


@dataclass(frozen=True)
class Board:
    """What pip would see there; ``cuda`` if a torch with CUDA is wanted from the index."""

    python: str
    platform: str
    cuda: bool = False


BOARDS = {
    "Raspberry Pi OS 12": Board("3.11", "aarch64-manylinux_2_36"),
    "Raspberry Pi OS 13": Board("3.13", "aarch64-manylinux_2_40"),
    "JetPack 6": Board("3.10", "aarch64-manylinux_2_35"),
    "aarch64 server, CUDA": Board("3.12", "aarch64-manylinux_2_39", cuda=True),
}


class Wheel(msgspec.Struct, frozen=True):
    """A file of the index."""

    url: str


class Package(msgspec.Struct, frozen=True):
    """One that is to be installed."""

    name: str
    version: str
    wheels: list[Wheel] = []

    @property
    def tags(self) -> str:
        """For which Python, ABI and machines its wheel is; "" if it has none."""
        if not self.wheels:
            return ""
        return self.wheels[0].url.rpartition("/")[2].removesuffix(".whl").split("-", 2)[2]


class Lock(msgspec.Struct, frozen=True):
    """What we read of a ``pylock.toml``."""

    packages: list[Package]


def resolve(board: Board) -> list[Package] | str:
    """What would be installed, or why nothing can be."""
    with tempfile.TemporaryDirectory() as folder:
        constraint = Path(folder) / "without.txt"
        constraint.write_text("" if board.cuda else CUDA_PACKAGES)
        command = [
            sys.executable,
            "-m",
            "uv",
            "pip",
            "compile",
            "--quiet",
            "--format",
            "pylock.toml",
        ]
        command += ["--no-python-downloads", "--only-binary", ":all:", "--extra", "fast"]
        command += ["--python-platform", board.platform, "--python-version", board.python]
        command += ["--constraint", str(constraint), str(ROOT / "pyproject.toml")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return done.stderr.strip()
    return msgspec.toml.decode(done.stdout, type=Lock).packages


def faults(packages: list[Package]) -> Iterator[str]:
    """What must not be."""
    for package in packages:
        if not package.wheels:
            yield f"{package.name} {package.version} has no wheel"
        if package.name in UNWANTED:
            yield f"{package.name} is needed"
        if package.name == "numpy" and int(package.version.partition(".")[0]) < 2:
            yield f"numpy is held at {package.version}"


def table(found: Mapping[str, list[Package]]) -> str:
    """Versions and tags by board, in Markdown; what is pure Python everywhere is a line below."""
    versions = {board: {p.name: p for p in packages} for board, packages in found.items()}
    names = sorted({name for packages in versions.values() for name in packages})
    pure = [n for n in names if all(_is_pure(p[n]) for p in versions.values() if n in p)]
    lines = ["| package | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for name in [name for name in names if name not in pure]:
        cells = (_cell(packages.get(name)) for packages in versions.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Pure Python: {', '.join(pure)}."])


def _is_pure(package: Package) -> bool:
    return package.tags.endswith("-none-any")


def _cell(package: Package | None) -> str:
    if package is None:
        return "-"
    python, _, platform = package.tags.partition("-")
    return f"{package.version}, {python} {platform.rpartition('-')[2].split('.')[0]}"


def write(path: Path, text: str) -> None:
    """Put the table into a page."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{path} has no place for it: {BEGIN.strip()} and {END}")
    path.write_text(f"{before}{BEGIN}\n{text}\n\n{END}{after}")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="a page that has the table's markers")
    arguments = parser.parse_args()
    found: dict[str, list[Package]] = {}
    lacks = []
    for name, board in BOARDS.items():
        packages = resolve(board)
        if isinstance(packages, str):
            lacks.append(f"{name}: {packages}")
            continue
        found[name] = packages
        lacks += [f"{name}: {fault}" for fault in faults(packages)]
    text = table(found)
    print(text)
    if arguments.write:
        write(arguments.write, text)
    if lacks:
        raise SystemExit("\n".join(lacks))


if __name__ == "__main__":
    main()
