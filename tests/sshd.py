"""A real sshd of a test, on loopback, with its own keys; an inventory of hosts that are it."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
START_SECONDS = 20.0
SERVER = """
Port {port}
ListenAddress 127.0.0.1
HostKey {place}/host
PidFile none
AuthorizedKeysFile {place}/user.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
MaxStartups 100
SetEnv {env} HOME={place}/home
"""
CLIENT = """
Host *
  HostName 127.0.0.1
  Port {port}
  User {user}
  IdentityFile {place}/user
  IdentitiesOnly yes
  UserKnownHostsFile {place}/known_hosts
"""


def free_port() -> int:
    """One that nobody listens on, just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def sshd(place: Path, env: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Run one; yields the ssh config by which any name reaches it.

    Args:
        place: a directory of its own.
        env: what a login has in its environment; by default our code, by ``PYTHONPATH``.
    """
    program = shutil.which("sshd") or shutil.which("/usr/sbin/sshd")
    missing = [tool for tool in ("ssh", "ssh-keygen", "rsync") if shutil.which(tool) is None]
    if program is None or missing:
        pytest.skip(f"no {', '.join(missing) or 'sshd'} on this machine")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it, and a package's unit makes it
    (place / "home").mkdir(parents=True, exist_ok=True)
    for name in ("host", "user"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place / name)]
        subprocess.run(words, check=True)
    port = free_port()
    words = [f"{name}={value}" for name, value in (env or {"PYTHONPATH": str(ROOT)}).items()]
    (place / "server").write_text(SERVER.format(port=port, place=place, env=" ".join(words)))
    (place / "config").write_text(CLIENT.format(port=port, place=place, user=getpass.getuser()))
    host = (place / "host.pub").read_text()
    (place / "known_hosts").write_text(f"[127.0.0.1]:{port} {host}")
    with (place / "log").open("wb") as log:
        words = [program, "-D", "-e", "-f", str(place / "server")]
        process = subprocess.Popen(words, stderr=log, start_new_session=True)
    try:
        _wait_for(port, process, place / "log")
        yield place / "config"
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.skip(f"sshd does not start here: {log.read_text().strip()}")
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        time.sleep(0.05)  # a poll of another process
    pytest.fail("sshd does not listen")


def inventory(place: Path, config: Path, *names: str, coordinator: str = "") -> Path:
    """A file with hosts that are all this machine, each with a directory of its own."""
    port = free_port()
    lines = ["[cluster]", f'ssh_config = "{config}"', f'python = "{sys.executable}"']
    lines += ["[coordinator]", f'host = "{coordinator}"', f'bind = "tcp://127.0.0.1:{port}"']
    lines += [f'address = "tcp://127.0.0.1:{port}"']
    for name in names:
        (place / name).mkdir()
        lines += [f"[hosts.{name}]", f'address = "{name}"', f'directory = "{place / name}"']
        lines += [f'venv = "{sys.prefix}"', "threads = 1"]
    path = place / "cluster.toml"
    path.write_text("\n".join(lines) + "\n")
    return path
