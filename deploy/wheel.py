"""The wheel of the Seedwire that runs here, made of its own files.

What is pushed to a host has to be what runs here, whether that is a checkout, an installation
from one, or an installation from a wheel; so no build tool, network or checkout is asked.  The
same files give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

DISTRIBUTION = "seedwire"
AS_THEY_ARE = ("entry_points.txt", "top_level.txt")
WHEEL = "Wheel-Version: 1.0\nGenerator: seedwire\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first time that a zip can hold
FILE_MODE = 0o644 << 16


def build(directory: Path) -> Path:
    """Make the wheel in a directory; returns its path."""
    found = metadata.distribution(DISTRIBUTION)
    info = f"{DISTRIBUTION}-{found.version}.dist-info"
    names = (found.read_text("top_level.txt") or "").split()
    files = dict(_code(names))
    files[f"{info}/METADATA"] = _metadata(found, _origin(DISTRIBUTION)).encode()
    files |= {f"{info}/{name}": (found.read_text(name) or "").encode() for name in AS_THEY_ARE}
    files[f"{info}/WHEEL"] = WHEEL.encode()
    lines = [f"{name},sha256={_digest(file)},{len(file)}\n" for name, file in files.items()]
    files[f"{info}/RECORD"] = ("".join(lines) + f"{info}/RECORD,,\n").encode()
    path = directory / f"{DISTRIBUTION}-{found.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = FILE_MODE
            wheel.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return path


def installed(wheel: Path) -> dict[str, str]:
    """The files that an installation of a wheel consists of: path -> SHA-256, in hexadecimal."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: hashlib.sha256(archive.read(name)).hexdigest()
            for name in archive.namelist()
            if not name.endswith("/RECORD")  # pip writes its own
        }


def _code(names: list[str]) -> Iterator[tuple[str, bytes]]:
    """The modules and packages of these names, and the data in them, as they are imported here."""
    for name in sorted(names):
        origin = _origin(name)
        is_package = origin.name == "__init__.py"
        for path in sorted(origin.parent.rglob("*")) if is_package else [origin]:
            inside = path.relative_to(origin.parent)
            if path.is_file() and "__pycache__" not in inside.parts:
                yield f"{name}/{inside.as_posix()}" if is_package else path.name, path.read_bytes()


def _origin(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"no module {name}")
    return Path(spec.origin)


def _metadata(found: metadata.Distribution, module: Path) -> str:
    """METADATA; in a checkout with what pyproject.toml asks for now, not when it was installed."""
    # A checkout that was installed as it stands has an egg-info, where METADATA is PKG-INFO.
    text = found.read_text("METADATA") or found.read_text("PKG-INFO") or ""
    head, _, description = text.partition("\n\n")
    pyproject = module.with_name("pyproject.toml")
    if pyproject.exists():
        project = msgspec.toml.decode(pyproject.read_bytes())["project"]
        ours = ("Requires-Dist:", "Provides-Extra:")
        kept = [line for line in head.splitlines() if not line.startswith(ours)]
        head = "\n".join([*kept, *_requires(project)])
    return f"{head}\n\n{description}"


def _requires(project: dict[str, Any]) -> Iterator[str]:
    yield from (f"Requires-Dist: {wanted}" for wanted in project["dependencies"])
    for extra, requirements in project["optional-dependencies"].items():
        yield f"Provides-Extra: {extra}"
        for requirement in requirements:
            name, _, marker = requirement.partition(";")
            also = f"({marker.strip()}) and " if marker else ""
            yield f'Requires-Dist: {name.strip()}; {also}extra == "{extra}"'


def _digest(content: bytes) -> str:
    """As RECORD has it."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
