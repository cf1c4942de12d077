"""Nodes on hosts: started so that they outlive the login, looked at, ended.

What is done there is ``deploy.steward``, which is sent each time.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from deploy import managed
from deploy.errors import HostError
from deploy.hosts import Host
from deploy.machine import Office
from deploy.parallel import Say
from deploy.ssh import Remote
from deploy.units import Scope

STEWARD = Path(__file__).with_name("steward.py").read_bytes()
LOGGED_IN = "logged in to run"
LOGIN_SECONDS = 60.0
STOP_SECONDS = 60.0  # the steward takes up to 30
COORDINATOR = "coordinator"  # the name of its process, where it runs on a host


class NodeError(HostError):
    """A node has ended by itself; ``code`` is its exit code, None if it is not known."""

    def __init__(self, why: str, code: int | None) -> None:
        super().__init__(why)
        self.code = code


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """How a process on a host is.

    Attributes:
        state: "running", "ended", "gone" (killed, or the machine went down), or "absent".
        code: what it ended with.
        line: the last of its log.
        pid: while it runs.
        seconds: since it was started, while it runs.
        memory: resident bytes while it runs, None where the host does not say.
        text: new in its log, where that was asked for; ``size`` is how far it was read.
        offset: of a start: where in its log it begins.
        seen: of a start: its log has had the line that was waited for.
        was: of a stop: the state before.
        systemd: whose has it: "user" or "system", or "" for none.
    """

    state: str
    code: int | None = None
    line: str = ""
    pid: int | None = None
    seconds: float = 0.0
    memory: int | None = None
    text: str = ""
    size: int = 0
    offset: int = 0
    seen: bool = False
    was: str = ""
    systemd: Literal["", "user", "system"] = ""

    @property
    def is_running(self) -> bool:
        return self.state == "running"

    @property
    def how(self) -> str:
        """It has ended: how."""
        if self.code is None:
            return "was killed, or the host went down"
        if self.code > 128:
            return f"was killed by signal {self.code - 128}"
        return f"ended with exit code {self.code}"


def ask(remote: Remote, do: str, name: str = "", *, timeout: float = 30.0, **more: Any) -> Status:
    """Have the steward do something on a host.

    Raises:
        HostError: the host cannot be reached, or has no Python.
    """
    host = remote.host
    wanted = {"do": do, "directory": host.directory, "name": name or host.name, **more}
    done = remote.run([host.python, "-", json.dumps(wanted)], stdin=STEWARD, timeout=timeout)
    try:
        return msgspec.json.decode(done.out, type=Status)
    except msgspec.DecodeError:
        raise HostError(f"{host.python} there: {done.why}") from None


def status(remote: Remote, after: int | None = None) -> Status:
    """How a host's node is; of one started by systemd, as that says, with the same log.

    Raises:
        HostError: as of ``ask``.
    """
    found = ask(remote, "status", after=after)
    if not found.systemd:
        return found
    said = managed.look(remote, found.systemd)
    pid, code = int(said.get("MainPID", "0")), int(said.get("ExecMainStatus", "0"))
    if said.get("ActiveState") in managed.RUNNING:
        memory = int(said["MemoryCurrent"]) if "MemoryCurrent" in said else None
        line = said.get("StatusText", found.line)
        changes: dict[str, Any] = {"state": "running", "pid": pid or None, "memory": memory}
        return msgspec.structs.replace(found, line=line, code=None, **changes)
    if said.get("ExecMainCode", "0") == "0":  # it never ran
        return msgspec.structs.replace(found, state="absent", code=None)
    killed = 128 if said["ExecMainCode"] != "1" else 0  # CLD_EXITED
    return msgspec.structs.replace(found, state="ended", code=killed + code)


@dataclass(frozen=True)
class Launch:
    """What the nodes are to be started with.

    Attributes:
        coordinator: where they reach it.
        clients: of each host, by name.
        office: admits them; None is ``--insecure``.
    """

    coordinator: str
    clients: dict[str, str]
    office: Office | None


def command(host: Host, launch: Launch) -> list[str]:
    """The command line of a host's node."""
    words = [host.interpreter, "-m", "node", "--coordinator", launch.coordinator]
    words += ["--name", host.name, "--clients", launch.clients[host.name]]
    words += ["--device", host.device, "--threads", str(host.threads)]
    words += ["--state", host.at("state", host.name)]
    limits = host.limits
    for option, value in (("memory", limits.memory), ("bytes", limits.bytes)):
        words += [f"--max-{option}", value] if value else []
    words += ["--max-seconds", str(limits.seconds)] if limits.seconds else []
    return [*words, *(["--keys", host.at("keys")] if launch.office else ["--insecure"])]


def environment(host: Host) -> dict[str, str]:
    """Of what we start on a host."""
    return {"SEEDWIRE_HOME": host.at("cache"), "PYTHONSAFEPATH": "1"}


def start(remote: Remote, launch: Launch, say: Say, within: float = LOGIN_SECONDS) -> Status:
    """Start a host's node, unless it runs in one way or another, and wait until it has logged in.

    Raises:
        HostError: it ended, or has not logged in; the line has the last one of its log.
    """
    if launch.office is not None:
        say("keys")
        launch.office.admit(remote)
    say("starting")
    was = status(remote)
    if scope := was.systemd if was.is_running else remote.host.systemd:
        now = _start_managed(remote, scope, launch, within)
    else:
        words, env = command(remote.host, launch), environment(remote.host)
        more: dict[str, Any] = {"command": words, "env": env, "until": LOGGED_IN, "within": within}
        now = ask(remote, "start", timeout=within + 30.0, **more)
    if not now.is_running:
        raise NodeError(f"the node {now.how}: {now.line or 'no output'}", now.code)
    if not now.seen:
        raise HostError(f"runs, but has not logged in within {within:.0f} s: {now.line}")
    clients = launch.clients[remote.host.name]
    say("ran already" if was.is_running else f"logged in, clients {clients}")
    return now


def _start_managed(remote: Remote, scope: Scope, launch: Launch, within: float) -> Status:
    """By the host's systemd, which starts it again from then on."""
    words = command(remote.host, launch)
    options = words[words.index("--device") :]
    del options[options.index("--state") : options.index("--state") + 2]  # the unit has its own
    if "--keys" in options:
        del options[options.index("--keys") :]  # likewise
    variables = {"COORDINATOR": launch.coordinator, "CLIENTS": launch.clients[remote.host.name]}
    variables["OPTIONS"] = shlex.join(options)
    is_in = managed.start(remote, scope, variables, within)
    return msgspec.structs.replace(status(remote), seen=is_in)


def stop(remote: Remote, say: Say) -> Status:
    """End what we have started on a host: its node, and a coordinator; nothing else.

    Raises:
        HostError: it has not ended.
    """
    before = status(remote)
    if before.systemd and before.state != "absent":
        managed.stop(remote, before.systemd)
    node = ask(remote, "stop", timeout=STOP_SECONDS)
    node = msgspec.structs.replace(node, was=before.state if before.systemd else node.was)
    centre = ask(remote, "stop", COORDINATOR, timeout=STOP_SECONDS)
    for what, found in (("node", node), ("coordinator", centre)):
        if found.is_running:
            raise HostError(f"the {what}, process {found.pid}, does not end")
    say("stopped" if "running" in (node.was, centre.was) else "nothing ran")
    return node
