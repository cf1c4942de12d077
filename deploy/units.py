"""systemd's units for a host: their text, and the commands that install, start and stop them.

``deploy/systemd/`` holds the units as they are for the system's manager; here they are rendered
for places of their own, and for a user's manager, which needs no root: without what only root
may ask for.  What differs from host to host is a file of variables and a drop-in.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Scope = Literal["user", "system"]
TEMPLATES = Path(__file__).parent / "systemd"
COORDINATOR, NODE = "seedwire-coordinator.service", "seedwire-node@.service"
STOP_SECONDS = 30.0  # as TimeoutStopSec= in the units
HIGH_SHARE = 0.95  # of MemoryMax: from there on the kernel takes back what it can
_DIRECTORIES = {"system": "/etc/systemd/system", "user": "~/.config/systemd/user"}
_ROOT_ONLY = re.compile(r"^# --- root only\n.*?^# --- end\n", re.MULTILINE | re.DOTALL)
_HOME = "ProtectHome=read-only\nReadWritePaths=-{}"
# Of NVIDIA's driver and of a Jetson's; groups of /proc/devices, those that there are.
_CUDA = ("char-nvidia*", "char-nvhost*", "char-nvgpu*", "char-nvmap", "char-host1x*", "char-drm")


@dataclass(frozen=True)
class Place:
    """Where a unit's files are on a host; absolute, or beginning with ``~/`` for a user's.

    Attributes:
        scope: whose manager runs it.
        program: the ``seedwire`` of a venv.
        configuration: directory of NAME.env.
        keys: directory of NAME.key and coordinator.pub.
        cache: directory of models and data.
        user: who runs it, of the system's units.
    """

    scope: Scope = "system"
    program: str = "/opt/seedwire/venv/bin/seedwire"
    configuration: str = "/etc/seedwire"
    keys: str = "/etc/seedwire/keys"
    cache: str = "/var/cache/seedwire"
    user: str = "seedwire"

    @classmethod
    def of_user(cls, directory: str = "~/.seedwire", program: str = "") -> Place:
        """All in one directory of the user's, as ``seedwire cluster push`` lays it out."""
        at = directory.rstrip("/")
        program = program or f"{at}/venv/bin/seedwire"
        return cls("user", program, f"{at}/run", f"{at}/keys", f"{at}/cache")


def unit(name: str, place: Place = Place()) -> str:
    """The text of a unit for a place.

    Args:
        name: ``COORDINATOR`` or ``NODE``.
        place: where its files are; the default gives the template itself.
    """
    text = (TEMPLATES / name).read_text()
    if place.scope == "user":
        text = _ROOT_ONLY.sub("", text).replace("multi-user.target", "default.target")
        text = text.replace("network-online.target", "").replace("\nWants=\n", "\n")
        if name == NODE:  # the coordinator's are in its state directory
            text = text.replace(" PYTHONSAFEPATH", f" SEEDWIRE_KEYS={place.keys} PYTHONSAFEPATH")
    if place.user != Place.user:  # a person's: what is ours is in their home
        text = text.replace(f"User={Place.user}", f"User={place.user}")
        text = text.replace("ProtectHome=yes", _HOME.format(place.cache))
    head, mark, body = text.partition("[Unit]")  # the comment above tells of the defaults
    default = Place()
    for there, here in (
        (default.program, place.program),
        (default.keys, place.keys),
        (default.configuration, place.configuration),
        (default.cache, place.cache),
    ):
        body = body.replace(there, here)
    return head + mark + body.replace("~/", "%h/")


def environment(variables: Mapping[str, str]) -> str:
    """The text of an EnvironmentFile."""
    return "".join(f'{name}="{_quoted(value)}"\n' for name, value in variables.items())


def _quoted(value: str) -> str:
    if "\n" in value:
        raise ValueError(f"a variable of a unit is one line: {value!r}")
    return value.replace("\\", "\\\\").replace('"', '\\"')


def drop_in(memory: int | None = None, device: str = "cpu", scope: Scope = "system") -> str:
    """What is particular to one host; "" if nothing is.

    Args:
        memory: bytes; the kernel ends a node that takes more, and nothing of it is swapped, so
            that the peak it reports is what the node needs.
        device: CUDA's devices are allowed for it alone.
        scope: a user's manager hides no devices in the first place.
    """
    lines = []
    if memory is not None:
        lines += [f"MemoryHigh={round(HIGH_SHARE * memory)}", f"MemoryMax={memory}"]
        lines += ["MemorySwapMax=0"]
    if device.startswith("cuda") and scope == "system":
        lines += ["PrivateDevices=no", *(f"DeviceAllow={name} rw" for name in _CUDA)]
    return "\n".join(["[Service]", *lines, ""]) if lines else ""


def node_files(
    place: Place, name: str, variables: Mapping[str, str], local: str = ""
) -> dict[str, str]:
    """All files of a node on a host: path -> text.

    Args:
        place: where they are.
        name: of the node.
        variables: COORDINATOR, CLIENTS and OPTIONS.
        local: from ``drop_in``.
    """
    units = _DIRECTORIES[place.scope]
    files = {
        f"{units}/{NODE}": unit(NODE, place),
        f"{place.configuration}/{name}.env": environment(variables),
    }
    if local:
        files[f"{units}/{instance(name)}.d/host.conf"] = local
    return files


def instance(name: str) -> str:
    """The unit of a node; what its name may hold needs no escaping but for ``-`` in paths."""
    return NODE.replace("@", f"@{name}")


def systemctl(scope: Scope, *arguments: str) -> list[str]:
    """A command of the manager; of a user's also where a login is not a session of its own."""
    if scope == "system":
        return ["sudo", "-n", "systemctl", *arguments]
    line = shlex.join(["systemctl", "--user", *arguments])
    return ["sh", "-c", f"XDG_RUNTIME_DIR=${{XDG_RUNTIME_DIR:-/run/user/$(id -u)}} exec {line}"]


def start(scope: Scope, name: str) -> list[list[str]]:
    """After the files are there: have them read, and start the node without waiting for its login.

    A user's units end with the last login unless they may linger.
    """
    linger = [] if scope == "system" else [["loginctl", "enable-linger"]]
    now = ["start", "--no-block", instance(name)]
    return [*linger, systemctl(scope, "daemon-reload"), systemctl(scope, *now)]


def waiting(scope: Scope, name: str, within: float) -> list[str]:
    """A command that ends with 0 once the node has logged in, else after ``within`` seconds."""
    active = shlex.join(systemctl(scope, "is-active", "--quiet", instance(name)))
    loop = f"i=0; until {active}; do [ $i -lt {within:.0f} ] || exit 1; i=$((i + 1)); sleep 1; done"
    return ["sh", "-c", loop]


def stop(scope: Scope, name: str) -> list[list[str]]:
    """End the node, which says goodbye; one that had failed is forgotten."""
    unit = instance(name)
    again = ["sh", "-c", f"{shlex.join(systemctl(scope, 'reset-failed', unit))} 2>/dev/null || :"]
    return [systemctl(scope, "stop", unit), again]


SHOWN = (
    *("ActiveState", "SubState", "StatusText", "Result", "NRestarts", "MainPID"),
    *("ExecMainCode", "ExecMainStatus", "MemoryCurrent"),
)


def show(scope: Scope, name: str) -> list[str]:
    """A command that says how the node does, as lines KEY=VALUE of ``SHOWN``."""
    return systemctl(scope, "show", "--property", ",".join(SHOWN), instance(name))


def shown(text: str) -> dict[str, str]:
    """What ``show`` said; what this systemd does not know, or has no figure for, is left out."""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {key: value for key, value in pairs if value not in ("", "[not set]", "infinity")}


def removal(place: Place, names: Sequence[str]) -> list[list[str]]:
    """Take the files of nodes away again, and the template with the last of them."""
    units = _DIRECTORIES[place.scope]
    sudo = ["sudo", "-n"] if place.scope == "system" else []
    gone = [f"{units}/{instance(name)}.d" for name in names]
    gone += [f"{place.configuration}/{name}.env" for name in names] + [f"{units}/{NODE}"]
    return [[*sudo, "rm", "-rf", *gone], systemctl(place.scope, "daemon-reload")]
