"""A host's node under its systemd, where the inventory or ``--systemd`` says so.

systemd starts it again, holds it to its memory and sees it hang; ``units`` has the texts.  A file
beside those of the steward says whose systemd it is, so that who looks later need not know.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath

from deploy import units
from deploy.errors import HostError
from deploy.hosts import Host
from deploy.ssh import Remote
from deploy.units import Place, Scope

WRITE = 'mkdir -p "$(dirname "$1")" && cat > "$1"'
RUNNING = ("active", "activating", "deactivating", "reloading")


def place(host: Host, scope: Scope, home: str, user: str) -> Place:
    """Where a host's files are: in our directory there, as ``push`` has laid it out.

    Args:
        host: of the inventory.
        scope: whose systemd.
        home: the home there, absolute.
        user: who we are there.
    """

    def at(path: str) -> str:
        return path.replace("~/", f"{home}/", 1) if path.startswith("~/") else path

    program = str(PurePosixPath(at(host.interpreter)).with_name("seedwire"))
    ours = {"configuration": at(host.at("run")), "keys": at(host.at("keys"))}
    return Place(scope, program, cache=at(host.at("cache")), user=user, **ours)


def files(host: Host, where: Place, variables: Mapping[str, str]) -> dict[str, str]:
    """What is written on the host: path -> text; its log is where ``cluster logs`` looks."""
    local = units.drop_in(host.limits.memory_bytes, host.device, where.scope)
    logs = f"{PurePosixPath(where.configuration).parent}/logs"
    local = (local or "[Service]\n") + "".join(
        f"Standard{stream}=append:{logs}/{host.name}.log\n" for stream in ("Output", "Error")
    )
    if "--insecure" in variables["OPTIONS"] and where.scope == "system":
        local += "LoadCredential=\n"  # there are no keys to hand over
    mark = {f"{where.configuration}/{host.name}.systemd": where.scope}
    return mark | units.node_files(where, host.name, variables, local)


def start(remote: Remote, scope: Scope, variables: Mapping[str, str], within: float) -> bool:
    """Install the units and start the node, unless it runs; whether it has logged in by then.

    Args:
        remote: the host.
        scope: whose systemd.
        variables: COORDINATOR, CLIENTS, OPTIONS.
        within: seconds to wait for the login.

    Raises:
        HostError: a command failed there; the line says which.
    """
    host = remote.host
    look(remote, scope)  # a host without it is left as it is
    home, user = remote.run(["sh", "-c", "cd && pwd && id -un"], check=True).text.split("\n")
    where = place(host, scope, home, user)
    sudo = ["sudo", "-n"] if scope == "system" else []
    remote.run(["mkdir", "-p", host.at("logs")], check=True)
    for path, text in files(host, where, variables).items():
        as_root = sudo if path.startswith("/etc/") else []
        remote.run([*as_root, "sh", "-c", WRITE, "sh", path], stdin=text.encode(), check=True)
    for command in units.start(scope, host.name):
        done = remote.run(command)
        if done.rc != 0:
            raise HostError(f"{_named(command)}: {done.why}")
    wait = units.waiting(scope, host.name, within)
    return remote.run(wait, timeout=within + 30.0).rc == 0


def look(remote: Remote, scope: Scope) -> dict[str, str]:
    """What its systemd says of the node: the keys of ``units.SHOWN`` that it knows."""
    done = remote.run(units.show(scope, remote.host.name))
    if done.rc != 0:
        raise HostError(f"systemctl show: {done.why}")
    return units.shown(done.text)


def stop(remote: Remote, scope: Scope) -> None:
    """End the node; its files stay, and nothing starts it again.

    Raises:
        HostError: it does not end.
    """
    for command in units.stop(scope, remote.host.name):
        done = remote.run(command, timeout=units.STOP_SECONDS + 30.0)
        if done.rc != 0:
            raise HostError(f"{_named(command)}: {done.why}")


def _named(command: list[str]) -> str:
    """The command that a person would type, without what is around it."""
    line = command[-1] if command[0] == "sh" else shlex.join(command)
    return line.rpartition(" exec ")[2]
