"""A host: an sshd in namespaces and control groups of its own, and the files that it sees.

It has its own network, processes, hostname, /run, /dev/shm and home directory; of the rest of the
disk it sees this machine's, so that a virtual environment works there.  No sandbox: it is root's.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from deploy.errors import LabError

START_SECONDS = 30.0
POLL_SECONDS = 0.02
PORT = 22
TOOLS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "nsenter": "util-linux",
    "unshare": "util-linux",
}
NAMESPACES = ("--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")

VERSION = f"python{sys.version_info[0]}.{sys.version_info[1]}"
PYTHON = f"{sys.base_prefix}/bin/{VERSION}"  # the machine's own, not that of a venv

# Of the host's own directory: /run/host.  No PAM: it could move a login to another control group.
SSHD_CONFIG = """\
ListenAddress {address}:{port}
HostKey /run/host/key
PidFile none
UsePAM no
StrictModes no
AuthorizedKeysFile /run/host/authorized_keys
AuthenticationMethods publickey
PermitRootLogin prohibit-password
AllowUsers root
MaxStartups 100
UseDNS no
PrintMotd no
SetEnv TMPDIR={home}/tmp
Subsystem sftp internal-sftp
"""
# /run is emptied: systemd, D-Bus and other daemons of this machine are none of the host's.
INSIDE = """\
set -e
echo {name} > /proc/sys/kernel/hostname
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd /run/lock /run/host
mount --bind {directory} /run/host
for file in passwd shadow hosts; do mount --bind /run/host/$file /etc/$file; done
cd {home}
exec {sshd} -D -e -f /run/host/sshd_config
"""


def tool(name: str) -> str | None:
    """Where a command of ours is; sshd is not on everybody's path."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def write(directory: Path, name: str, address: str, names: Mapping[str, str]) -> None:
    """Write what a host sees of its own; its keys are there already.

    Args:
        directory: of the host, absolute.
        name: of the host.
        address: where its sshd listens.
        names: addresses by host, which it knows the others by.
    """
    home = directory / "home"
    (home / "tmp").mkdir(parents=True, mode=0o700)
    config = SSHD_CONFIG.format(address=address, port=PORT, home=home)
    (directory / "sshd_config").write_text(config)
    (directory / "passwd").write_text(_passwd(Path("/etc/passwd").read_text(), home))
    (directory / "shadow").write_text("root:*:19000:0:99999:7:::\n")  # keys alone; not locked
    (directory / "shadow").chmod(0o600)
    lines = ["127.0.0.1 localhost", *(f"{a} {n}" for n, a in names.items())]
    (directory / "hosts").write_text("\n".join(lines) + "\n")
    inside = INSIDE.format(name=name, directory=directory, home=home, sshd=tool("sshd"))
    (directory / "start.sh").write_text(inside)


def share_packages(directory: Path) -> None:
    """Let the host's Python find the packages of ours."""
    site = directory / "home/.local/lib" / VERSION / "site-packages"
    site.mkdir(parents=True)
    paths = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (site / "lab.pth").write_text("".join(f"{path}\n" for path in paths))


def start(directory: Path, network: Path, groups: Iterable[Path]) -> subprocess.Popen[bytes]:
    """Start a host's sshd, which outlives us.

    Args:
        directory: as it was written.
        network: the host's namespace.
        groups: files that a process joins its control groups by.
    """
    join = "".join(f"echo 0 > {shlex.quote(str(path))}; " for path in groups)
    enter = f"exec nsenter --net={network} unshare {' '.join(NAMESPACES)}"
    command = ["sh", "-c", f"set -e; {join}{enter} sh {directory}/start.sh"]
    with (directory / "sshd.log").open("ab") as log:
        return subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def wait(directory: Path, process: subprocess.Popen[bytes], address: str) -> None:
    """Wait until a host takes connections.

    Raises:
        LabError: it does not, with the last line of its log.
    """
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if answers(address):
            return
        time.sleep(POLL_SECONDS)
    lines = (directory / "sshd.log").read_text(errors="replace").strip().splitlines()
    said = lines[-1] if lines else f"no answer within {START_SECONDS:.0f} seconds"
    raise LabError(f"sshd of {directory.name} has not come up: {said}")


def answers(address: str, seconds: float = 1.0) -> bool:
    """Whether there is an sshd at an address."""
    try:
        with socket.create_connection((address, PORT), timeout=seconds) as connection:
            connection.settimeout(seconds)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def _passwd(text: str, home: Path) -> str:
    """The users of this machine, with root's home elsewhere."""
    lines = [line.split(":") for line in text.splitlines() if line.count(":") == 6]
    shell = "/bin/bash" if Path("/bin/bash").exists() else "/bin/sh"
    root = ["root", "x", "0", "0", "root", str(home), shell]
    others = [fields for fields in lines if fields[0] != "root"]
    return "".join(":".join(fields) + "\n" for fields in [root, *others])
