"""Runs on a host, by its own Python: what is there, and can it reach the coordinator.

``deploy.check`` sends this text, for Python 3.8 and its library; torch is
not imported.
"""

from __future__ import annotations

import glob
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

CONNECT_SECONDS = 5.0
SPEAKS = (b"\xff", b"s")  # how ZeroMQ greets, and how ``deploy.listener`` does
PI_FLAGS = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")
SOFTWARE = """
import importlib.metadata as m, importlib.util as u, json, os, platform, re
def version(name):
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return None
cuda = None
spec = u.find_spec("torch")
if spec and spec.origin:
    path = os.path.join(os.path.dirname(spec.origin), "version.py")
    text = open(path).read() if os.path.exists(path) else ""
    found = re.search(r"^cuda.*= *'([^']+)'", text, re.M)
    cuda = found[1] if found else None
print(json.dumps({"python": platform.python_version(), "torch": version("torch"), "cuda": cuda,
                  "seedwire": version("seedwire"), "venv": u.find_spec("ensurepip") is not None}))
"""


def software(python: str) -> Any:
    """Versions of a Python and of what it can import; None if it is not there."""
    try:
        done = subprocess.run(
            [python, "-c", SOFTWARE], stdout=subprocess.PIPE, timeout=60, check=True
        )
        return json.loads(done.stdout.decode())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def memory() -> list[int] | list[None]:
    """Bytes in all and available, None where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        found = [int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable")]
    except (OSError, KeyError):
        return [None, None]
    limit = group_limit()
    return found if limit is None else [min(n, limit) for n in found]


def group_limit() -> int | None:
    """Bytes that the control group of a login may have, version 1 or 2; None without a limit."""
    for line in read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            limit = read("/sys/fs/cgroup/memory" + path + "/memory.limit_in_bytes")
        elif not controllers:
            limit = read("/sys/fs/cgroup" + path + "/memory.max")
        else:
            continue
        if limit.isdigit():
            return int(limit)
    return None


def free_bytes(directory: str) -> int:
    """Free disk where the directory is or would be."""
    path = Path(directory).expanduser()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(str(path)).free


def writable(directory: str) -> bool:
    """Whether we may write in the directory, or make it."""
    path = Path(directory).expanduser()
    while not path.exists():
        path = path.parent
    return os.access(str(path), os.W_OK | os.X_OK)


def throttled() -> str | None:
    """Why it has been slower than it can since it was switched on; None if it does not say."""
    text = read("/sys/devices/platform/soc/soc:firmware/get_throttled")
    if not text and shutil.which("vcgencmd"):
        done = subprocess.run(["vcgencmd", "get_throttled"], stdout=subprocess.PIPE, check=False)
        text = done.stdout.decode().partition("=")[2].strip()
    if text:
        bits = int(text, 16)
        since = (bits | bits >> 16) & 15
        return ", ".join(flag for i, flag in enumerate(PI_FLAGS) if since >> i & 1)
    counts = glob.glob("/sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count")
    counts += glob.glob("/sys/class/hwmon/hwmon*/oc*_event_cnt")
    if not counts:
        return None
    total = sum(int(read(path) or 0) for path in counts)
    return f"{total} times since it was switched on" if total else ""


def read(path: str) -> str:
    """The text of a file, "" if it cannot be read."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def reach(host: str, port: int) -> str:
    """Why nothing of ours answers there ("refused", "silent", ...); "" if it does."""
    try:
        with socket.create_connection((host, port), CONNECT_SECONDS) as connection:
            connection.settimeout(CONNECT_SECONDS)
            return "" if connection.recv(1) in SPEAKS else "stranger"
    except socket.gaierror:
        return "unknown"
    except socket.timeout:
        return "silent"
    except ConnectionRefusedError:
        return "refused"
    except OSError as error:
        return error.strerror or str(error)


def main() -> None:
    """Print as JSON what there is, for the JSON in the first argument."""
    wanted = json.loads(sys.argv[1])
    total, available = memory()
    print(
        json.dumps(
            {
                "system": software(sys.executable),
                "venv": software(os.path.expanduser(wanted["interpreter"])),
                "machine": platform.machine(),
                "memory": total,
                "available": available,
                "cores": os.cpu_count(),
                "disk": free_bytes(wanted["directory"]),
                "writable": writable(wanted["directory"]),
                "throttled": throttled(),
                "rsync": shutil.which("rsync") is not None,
                "gpu": bool(glob.glob("/dev/nvidia[0-9]*") + glob.glob("/dev/nvhost-ctrl-gpu")),
                "port": reach(*wanted["reach"]) if wanted["reach"] else None,
            }
        )
    )


if __name__ == "__main__":
    main()
