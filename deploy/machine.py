"""A machine to run commands on: this one, or a host by ssh, which does the same over a network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from deploy.errors import HostError
from deploy.hosts import Host
from deploy.inventory import Inventory
from deploy.ssh import Done, Remote


class Machine(Protocol):
    """Runs Seedwire's commands."""

    def seedwire(self, words: Sequence[str], *, stdin: bytes | None = None) -> Done:
        """Run ``seedwire WORDS``.

        Raises:
            HostError: it failed.
        """


class Here:
    """This machine."""

    def seedwire(self, words: Sequence[str], *, stdin: bytes | None = None) -> Done:
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "seedwire", *words],
            input=stdin or b"",
            capture_output=True,
            check=False,
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        )
        return _checked(Done(done.returncode, done.stdout, done.stderr))


class There:
    """A host of the inventory."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote

    def seedwire(self, words: Sequence[str], *, stdin: bytes | None = None) -> Done:
        command = ["env", "PYTHONSAFEPATH=1", self.remote.host.interpreter, "-m", "seedwire"]
        done = self.remote.run([*command, *words], stdin=stdin)
        if done.rc in (126, 127):
            raise HostError(f"no Seedwire there ({done.why}): seedwire cluster push")
        return _checked(done)


def _checked(done: Done) -> Done:
    if done.rc != 0:
        raise HostError(done.why.removeprefix("seedwire: "))
    return done


# --- keys ------------------------------------------------------------------------


class Office:
    """The coordinator's keys, on its machine: admits hosts by keys that these make themselves.

    No secret is moved: a host's public key comes here, the coordinator's goes there.

    Args:
        machine: the coordinator's.
        keys: directory of keys there; "" is that machine's default.
    """

    def __init__(self, machine: Machine, keys: str = "") -> None:
        self._machine = machine
        self._where = ["--keys", keys] if keys else []

    def admit(self, remote: Remote) -> None:
        """Have a host's node admitted, and have it trust the coordinator.

        Raises:
            HostError: the host cannot make a key, is enrolled with another one, or trusts another
                coordinator.
        """
        host = remote.host
        path = host.at("keys", f"{host.name}.pub")
        public = remote.run(["cat", path])
        if public.rc != 0:
            There(remote).seedwire(["keys", "new", host.name, "--keys", host.at("keys")])
            public = remote.run(["cat", path], check=True)
        self._machine.seedwire(["keys", "enroll", "/dev/stdin", *self._where], stdin=public.out)
        ours = self._machine.seedwire(["keys", "public", *self._where]).out
        self._pin(remote, ours)

    def _pin(self, remote: Remote, ours: bytes) -> None:
        path = remote.host.at("keys", "coordinator.pub")
        found = remote.run(["cat", path])
        if found.rc == 0 and found.out != ours:
            raise HostError(f"it trusts another coordinator: rm {path} there if this is the one")
        if found.rc != 0:
            write = 'cat > "$1.part" && mv "$1.part" "$1"'
            remote.run(["sh", "-c", write, "sh", path], stdin=ours, check=True)


def office(inventory: Inventory, remotes: Sequence[Remote], keys: Path | None) -> Office:
    """Where the inventory's coordinator keeps its keys.

    Args:
        inventory: says where it runs.
        remotes: of all hosts.
        keys: directory of keys, if the coordinator is here; None is the user's.
    """
    name = inventory.coordinator.host
    if not name:
        return Office(Here(), str(keys) if keys else "")
    remote = next(remote for remote in remotes if remote.host.name == name)
    return Office(There(remote), remote.host.at("keys"))


def log_path(host: Host, name: str = "") -> str:
    """Where the log of a host's node lies, or of another process that was started there."""
    return host.at("logs", f"{name or host.name}.log")
