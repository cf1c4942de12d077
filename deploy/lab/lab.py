"""An emulated cluster on this machine: up, down, status, and cables pulled.

All that is made is named by the lab's directory, or lies in it.  So `down` needs no record of what
`up` has made, and removes what is left of one that was killed on its way.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from deploy.errors import LabError
from deploy.lab import entry, host
from deploy.lab.cgroups import Groups, Use
from deploy.lab.file import Host, Lab
from deploy.lab.network import Network, call, impossible

Say = Callable[[str], None]

RECORD = "lab.json"  # its presence says that a directory is a lab's


@dataclass(frozen=True)
class Status:
    """A host as it is now.

    Attributes:
        state: "up", "cut" or "down".
    """

    host: Host
    state: str
    use: Use


def up(lab: Lab, directory: Path, say: Say) -> None:
    """Make a lab, whole or not at all.

    Args:
        lab: what is to be.
        directory: for its files; must not be there, or be empty.
        say: told what a person may want to know.

    Raises:
        LabError: it cannot be; nothing is left of it.
    """
    _check_machine()
    directory = directory.absolute()
    if not re.fullmatch(r"[\w/.+@-]+", str(directory)):
        raise LabError(f"{directory}: a lab's path has letters, digits and / . _ + @ - alone")
    if directory.exists() and any(directory.iterdir()):
        if (directory / RECORD).exists():
            raise LabError(f"{directory} is a lab already: seedwire lab down comes first")
        raise LabError(f"{directory} is in the way: a lab is made in a directory of its own")
    _check_addresses(lab)
    directory.mkdir(parents=True, mode=0o700, exist_ok=True)
    with _locked(directory):
        (directory / RECORD).write_bytes(msgspec.json.encode(lab))
        try:
            _build(lab, directory, say)
        except BaseException:
            _remove(directory)
            raise


def down(directory: Path) -> None:
    """Remove a lab and all that it runs; what is not there is no matter.

    Raises:
        LabError: somebody else is at it, or the directory is not a lab's.
    """
    _check_machine()
    directory = directory.absolute()
    if not directory.exists():
        _remove(directory)
        return
    if any(directory.iterdir()) and not (directory / RECORD).exists():
        raise LabError(f"{directory} is not a lab's: there is no {RECORD} in it")
    with _locked(directory):
        _remove(directory)


def status(directory: Path) -> list[Status]:
    """Each host as it is now.

    Raises:
        LabError: there is no lab.
    """
    lab, network, groups = _opened(directory)
    found = []
    for each in lab.hosts:
        state = "up"
        if not network.path(each.name).exists():
            state = "down"
        elif not network.is_plugged(each.name):
            state = "cut"
        elif not host.answers(each.address):
            state = "down"
        found.append(Status(each, state, groups.use(each.name)))
    return found


def cut(directory: Path, name: str) -> None:
    """Cut a host off: nothing gets through to it or from it, and nobody is told.

    Raises:
        LabError: there is no such lab or host.
    """
    _, network, _ = _opened(directory, name)
    network.unplug(name)


def mend(directory: Path, name: str) -> None:
    """Let a host be reached again.

    Raises:
        LabError: there is no such lab or host.
    """
    _, network, _ = _opened(directory, name)
    network.plug(name)


def missing() -> str | None:
    """Why there can be no lab here, or None."""
    absent = [f"{name} ({package})" for name, package in host.TOOLS.items() if not host.tool(name)]
    return f"install {', '.join(absent)}" if absent else impossible()


def label(directory: Path) -> str:
    """What all of a lab is named by, in 13 letters: a network device may have 15."""
    digest = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()
    return f"swlab{digest[:8]}"


def _network(lab: Lab | None, directory: Path) -> Network:
    hosts = {each.name: each.address for each in lab.hosts} if lab else {}
    return Network(label(directory), hosts, lab.bits if lab else 0, lab.here if lab else "")


def _build(lab: Lab, directory: Path, say: Say) -> None:
    groups, network = Groups(label(directory)), _network(lab, directory)
    files = {each.name: directory / "hosts" / each.name for each in lab.hosts}
    entry.make_keys(directory, files)
    for each in lab.hosts:
        host.write(files[each.name], each.name, each.address, network.addresses)
        if lab.packages:
            host.share_packages(files[each.name])
    network.build()
    has_netem = network.has_netem()
    absent = groups.absent()
    if not has_netem and any(each.link.needs_netem for each in lab.hosts):
        absent.append("delay and loss (netem)")
    for words in absent:
        say(f"this kernel has no {words}: left out")
    started = {}
    for each in lab.hosts:
        network.shape(each.name, each.link, has_netem)
        joins = groups.make(each.name, each.memory, each.cpus)
        started[each.name] = host.start(files[each.name], network.path(each.name), joins)
    for each in lab.hosts:
        host.wait(files[each.name], started[each.name], each.address)
        say(f"{each.name} is up at {each.address}")
    entry.write(lab, directory)


def _remove(directory: Path) -> None:
    """All of it; the record last, so that who is killed here can be followed by another."""
    Groups(label(directory)).remove()  # first its processes
    _network(None, directory).tear_down()
    Groups(label(directory)).remove()  # one that was on its way into both
    if directory.exists():
        for path in [*directory.iterdir(), directory]:
            if path.name != RECORD:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _opened(directory: Path, name: str | None = None) -> tuple[Lab, Network, Groups]:
    _check_machine()
    directory = directory.absolute()
    try:
        lab = msgspec.json.decode((directory / RECORD).read_bytes(), type=Lab)
    except (OSError, msgspec.DecodeError) as error:
        raise LabError(f"{directory}: no lab is up here") from error
    names = [each.name for each in lab.hosts]
    if name is not None and name not in names:
        raise LabError(f"no host {name}: there are {', '.join(names)}")
    return lab, _network(lab, directory), Groups(label(directory))


def _check_machine() -> None:
    if why := missing():
        raise LabError(f"no lab here: {why}")


def _check_addresses(lab: Lab) -> None:
    """Refuse a network that this machine has already, or the lab would take its traffic."""
    routes = json.loads(call("ip", "-json", "route", "show", "match", lab.here) or "[]")
    for route in routes:
        if route["dst"] != "default" and "gateway" not in route:
            taken = f"{route['dst']} on {route['dev']}"
            raise LabError(f"lab.network: {taken} is this machine's already: choose another")


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """The directory to ourselves; a process that is killed holds it no longer."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            why = "another seedwire lab is at work there"
            raise LabError(f"{directory}: {why}") from error
        yield
    finally:
        os.close(handle)
