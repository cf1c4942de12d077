"""Runs on a host, by whatever Python 3 it has: compares files with hashes, puts copies in place.

``deploy.push`` sends the text of this module; nothing but the standard library is there.  A copy
arrives in ``incoming``, where a broken one can be resumed and nobody looks, and is moved to where
it belongs when its hash is right: a root appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INCOMING = "incoming"
PIECE = 1 << 20

# root -> path below it, or "" for a root that is a file -> SHA-256, in hexadecimal
Roots = Mapping[str, Mapping[str, str]]


def check(base: Path, roots: Roots) -> dict[str, Any]:
    """What has to be done until every root is what it should be.

    All is read: bits that rotted have left size and time as they were.

    Returns:
        Paths below ``base`` to be copied, roots to be placed, and the bytes that are free.
    """
    base.mkdir(parents=True, exist_ok=True)
    lacking, open_ = [], []
    for root, files in roots.items():
        wanted = paths(root, files)
        bad = [path for path, hash_ in wanted.items() if digest(base / path) != hash_]
        lacking += [path for path in bad if digest(base / INCOMING / path) != wanted[path]]
        if bad or _strays(base, root, wanted) or _noted(base, root) != _lines(root, wanted):
            open_.append(root)
    return {"lacking": lacking, "open": open_, "free": shutil.disk_usage(base).free}


def place(base: Path, roots: Roots) -> dict[str, Any]:
    """Move what came to where it belongs, drop what a root should not have, note the hashes.

    Returns:
        Paths of files that did not come as they should; of their roots nothing is touched.
    """
    lacking = []
    for root, files in roots.items():
        wanted = paths(root, files)
        came = [path for path in wanted if (base / INCOMING / path).exists()]
        wrong = [path for path in came if digest(base / INCOMING / path) != wanted[path]]
        wrong += [path for path in wanted if path not in came and not (base / path).exists()]
        lacking += wrong
        if not wrong:
            _move(base, root, came)
            for stray in _strays(base, root, wanted):
                stray.unlink()
            _note(base, root, _lines(root, wanted))
    if not lacking:
        shutil.rmtree(base / INCOMING, ignore_errors=True)
    return {"lacking": lacking}


def paths(root: str, files: Mapping[str, str]) -> dict[str, str]:
    """The hashes of a root's files by their paths below the base."""
    return {f"{root}/{name}" if name else root: hash_ for name, hash_ in files.items()}


def digest(path: Path) -> str:
    """The SHA-256 of a file; "" if there is none that can be read."""
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                found.update(piece)
    except OSError:
        return ""
    return found.hexdigest()


def _move(base: Path, root: str, came: list[str]) -> None:
    whole = base / root
    if came and not whole.exists():
        whole.parent.mkdir(parents=True, exist_ok=True)
        (base / INCOMING / root).rename(whole)
        return
    for path in came:
        (base / path).parent.mkdir(parents=True, exist_ok=True)
        (base / INCOMING / path).replace(base / path)
        os.utime(base / path)  # now: what was made of the old content is made again


def _strays(base: Path, root: str, wanted: Mapping[str, str]) -> list[Path]:
    found = (path for path in (base / root).rglob("*") if path.is_file())
    return [path for path in found if path.relative_to(base).as_posix() not in wanted]


def _lines(root: str, wanted: Mapping[str, str]) -> str:
    """For ``sha256sum --check``, from the directory that the root is in."""
    above = root.rpartition("/")[0]
    return "".join(
        f"{hash_}  {os.path.relpath(path, above or '.')}\n" for path, hash_ in wanted.items()
    )


def _noted(base: Path, root: str) -> str:
    try:
        return (base / f"{root}.sha256").read_text()
    except OSError:
        return ""


def _note(base: Path, root: str, lines: str) -> None:
    part = base / f"{root}.sha256.part"
    part.write_text(lines)
    part.replace(base / f"{root}.sha256")


def main() -> None:
    """Read what to do from standard input and print what came of it, both as JSON."""
    order = json.load(sys.stdin)
    do = {"check": check, "place": place}[order["do"]]
    print(json.dumps(do(Path(order["base"]).expanduser(), order["roots"])))  # noqa: T201


if __name__ == "__main__":
    main()
