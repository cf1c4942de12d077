"""Seedwire into a venv of a host, by the host's own pip, and never another torch than it has."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import msgspec

from deploy.cargo import CACHE, DIST, WHEELS, WITHOUT_CUDA, Cargo
from deploy.errors import HostError
from deploy.parallel import Say
from deploy.ssh import Remote

PIP_SECONDS = 3600.0  # torch to an SD card
LOAD_SECONDS = 300.0
OLDEST = (3, 10)
PROBE = """import sys; sys.path.pop(0)  # what lies about in the home there is not installed
import hashlib, json, os, platform, sysconfig
import importlib.metadata as m, importlib.util as u
site = os.path.realpath(sysconfig.get_paths()["purelib"])
def version(name):
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return ""
def has(name):
    return u.find_spec(name) is not None
def is_checkout():
    found = m.distributions(name="seedwire", path=[site])
    return any('"editable": true' in (d.read_text("direct_url.json") or "") for d in found)
def packages():
    found = sorted({(str(d.metadata["Name"]), str(d.version)) for d in m.distributions()})
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()
print(json.dumps({
    "version": sys.version_info[:3], "machine": platform.machine(), "has_torch": has("torch"),
    "torch": version("torch") if has("torch") else "", "has_pip": has("pip"),
    "has_ensurepip": has("ensurepip"), "is_checkout": is_checkout(), "site": site,
    "packages": packages()}))
"""
LOADS = "import sys; sys.path.pop(0); import torch, numpy; torch.from_numpy(numpy.zeros(1))"
TAKES = (
    "import sys; sys.path.pop(0); import transformers as t; sys.exit(not t.is_torch_available())"
)
NOTE = "installed.sha256"
WITH_HOME = 'SEEDWIRE_HOME="$1" PYTHONSAFEPATH=1; export SEEDWIRE_HOME PYTHONSAFEPATH; shift; "$@"'
COMPARE = """
import hashlib, json, os, sys
site, wanted = json.load(sys.stdin)
def same(name, hash_):
    try:
        with open(os.path.join(site, name), "rb") as file:
            return hashlib.sha256(file.read()).hexdigest() == hash_
    except OSError:
        return False
print(json.dumps(all(same(*item) for item in wanted.items())))
"""


@dataclass(frozen=True)
class Python:
    """A Python on a host.

    Attributes:
        torch: version of the torch that it can import, "" if none.
        packages: hash of the names and versions of all that is installed in it.
        site: where its pip puts pure packages.
        is_checkout: Seedwire is installed in it from a checkout there (``pip install -e``).
    """

    path: str
    version: tuple[int, int, int]
    machine: str
    torch: str
    packages: str
    site: str
    has_pip: bool
    has_ensurepip: bool
    is_checkout: bool


def install(remote: Remote, cargo: Cargo, say: Say, fresh: bool = False) -> str:
    """Have the wheel, and all that it asks for, in the host's venv; a torch that is there stays.

    A venv that is as an installation of the same has left it is not installed into again: pip,
    and torch to be loaded, would take most of a push.

    Args:
        remote: the host, which has the cargo.
        cargo: what was brought.
        say: shows what is being done.
        fresh: whether to make the venv anew.

    Returns:
        What is there now, in words.

    Raises:
        HostError: saying what to do.
    """
    python = _venv(remote, say, fresh)
    if python.is_checkout:
        return f"torch {python.torch}, and the checkout there is left alone"
    if not fresh and _is_as_left(remote, python, cargo):
        return f"torch {python.torch} (kept)"
    say("pip install" + ("" if python.torch else ", with torch: this takes minutes"))
    wheel = remote.host.at(cargo.wheel)
    wanted = [f"{wheel}[fast]", *([f"torch=={python.torch}"] if python.torch else [])]
    options = _options(remote, python, cargo)
    _pip(remote, python, [*options, *wanted])
    if not _is_current(remote, python, cargo):
        _pip(remote, python, ["--no-index", "--no-deps", "--force-reinstall", wheel])
    say("loading torch")
    why = _fault(remote, python, LOADS)
    if why and python.torch:
        say("an older numpy, for the host's torch")
        _pip(remote, python, [*options, *wanted, "numpy<2"])
        why = _fault(remote, python, LOADS)
    if why:
        raise HostError(f"torch does not load: {why}: see docs/boards.md")
    now = probe(remote, python.path)
    if _fault(remote, python, TAKES):
        raise HostError(f"transformers takes no torch {now.torch}: see docs/boards.md for another")
    if python.torch and now.torch != python.torch:
        raise HostError(f"torch {python.torch} became {now.torch}: please report it")
    remote.run(["tee", remote.host.at(NOTE)], stdin=_mark(now, cargo).encode(), check=True)
    return f"torch {now.torch}" + (" (kept)" if python.torch else "")


def prepare(remote: Remote, cargo: Cargo) -> None:
    """Have the host find what it was brought by the experiments' names, and convert GGUF models.

    Raises:
        HostError: it does not.
    """
    if not cargo.sources:
        return
    host = remote.host
    command = ["sh", "-c", WITH_HOME, "sh", host.at(CACHE), host.interpreter, "-m", "seedwire"]
    done = remote.run([*command, "fetch", *cargo.sources], timeout=LOAD_SECONDS)
    if done.rc != 0:
        raise HostError(done.why.removeprefix("seedwire: "))


def _venv(remote: Remote, say: Say, fresh: bool) -> Python:
    """The venv of the inventory, which has to be there, or ours, which is made of the host's."""
    host = remote.host
    if host.venv:
        if (found := find(remote, host.interpreter)) is None:
            raise HostError(f"no Python {host.interpreter} there: correct `venv` in the inventory")
        return found
    found = None if fresh else find(remote, host.interpreter)
    if found is not None and found.has_pip:
        return found
    base = probe(remote, host.python)
    if not base.has_ensurepip:
        raise HostError("its Python makes no venv: sudo apt install python3-venv there")
    say("making a venv")
    command = [host.python, "-m", "venv", "--clear", host.at("venv")]
    if base.torch:  # a vendor's, e.g. a Jetson's
        command.insert(3, "--system-site-packages")
    remote.run(command, timeout=LOAD_SECONDS, check=True)
    return probe(remote, host.interpreter)


def find(remote: Remote, path: str) -> Python | None:
    """A Python on a host, None if there is none.

    Raises:
        HostError: it is too old, or has a torch that pip does not know.
    """
    done = remote.run([path, "-c", PROBE])
    if done.rc != 0:
        return None
    found: dict[str, Any] = json.loads(done.out)
    if tuple(found["version"]) < OLDEST:
        version = ".".join(map(str, found["version"]))
        raise HostError(f"Python {version} is too old: want 3.10, see `python` of the inventory")
    if found["has_torch"] and not found["torch"]:
        raise HostError(f"pip knows nothing of the torch that {path} imports: it would add another")
    return msgspec.convert(found | {"path": path}, Python)


def probe(remote: Remote, path: str) -> Python:
    """A Python on a host; as ``find``, and it is an error if there is none."""
    if (found := find(remote, path)) is None:
        raise HostError(f"no Python {path} there: correct `python` in the inventory")
    return found


def _options(remote: Remote, python: Python, cargo: Cargo) -> list[str]:
    """Of pip, for where wheels are had, and which."""
    host = remote.host
    options = ["--only-binary", ":all:"]  # a board has no compiler, or no memory for it
    if cargo.is_offline:
        options += ["--no-index", "--find-links", host.at(WHEELS)]
    if not python.torch and python.machine == "aarch64" and host.device == "cpu":
        options += ["--constraint", host.at(DIST, WITHOUT_CUDA)]
    return options


def _pip(remote: Remote, python: Python, words: list[str]) -> None:
    command = [python.path, "-m", "pip", "install", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", *words]
    done = remote.run(command, timeout=PIP_SECONDS)
    if done.rc != 0:
        errors = [
            line for line in done.err.decode(errors="replace").splitlines() if "ERROR" in line
        ]
        why = errors[0].removeprefix("ERROR: ") if errors else done.why
        raise HostError(f"pip: {why}")


def _fault(remote: Remote, python: Python, code: str) -> str:
    """Why code cannot be run; "" if it can."""
    done = remote.run([python.path, "-c", code], timeout=LOAD_SECONDS)
    return done.why if done.rc != 0 else ""


def _mark(python: Python, cargo: Cargo) -> str:
    """Equal for equal installations of equal wheels."""
    whole = [python.path, python.version, python.packages, sorted(cargo.installed.items())]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


def _is_as_left(remote: Remote, python: Python, cargo: Cargo) -> bool:
    """Whether an installation of this wheel has ended well, and nothing has changed since."""
    noted = remote.run(["cat", remote.host.at(NOTE)]).text
    return noted == _mark(python, cargo) and _is_current(remote, python, cargo)


def _is_current(remote: Remote, python: Python, cargo: Cargo) -> bool:
    """Whether the files of our wheel are those that are installed: versions alone do not say."""
    stdin = json.dumps([python.site, cargo.installed]).encode()
    done = remote.run([python.path, "-c", COMPARE], stdin=stdin, check=True)
    return bool(json.loads(done.out))
