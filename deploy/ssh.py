"""Commands on hosts, by the user's own ``ssh`` and ``rsync``.

Their config, agent, jump hosts and known_hosts are respected, because it is their ssh that
runs.  Nothing is asked (BatchMode): what needs a person fails with a line that says what to do.
All commands of one ``remotes`` block share one login per host.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.errors import HostError
from deploy.hosts import Host

CONNECT_SECONDS = 10
RUN_SECONDS = 60.0
SSH_FAILED = 255  # what ssh itself ends with
MENDING = {  # what ssh or rsync says -> what to do
    "permission denied": "ssh-copy-id {at}, or load the key: ssh-add",
    "host key verification failed": "if the host is right, log in once by hand: ssh {at}",
    "remote host identification has changed": "if it was reinstalled: ssh-keygen -R {at}",
    "could not resolve": "correct `address` in the inventory, or the name in ~/.ssh/config",
    "connection refused": "start sshd there: sudo systemctl enable --now ssh",
    "timed out": "is it on, and on this network?",
    "no route to host": "is it on, and on this network?",
    "network is unreachable": "is it on, and on this network?",
    "rsync: command not found": "install rsync there: sudo apt install rsync",
    "rsync: not found": "install rsync there: sudo apt install rsync",
}


@dataclass(frozen=True)
class Done:
    """What a command on a host came to."""

    rc: int
    out: bytes
    err: bytes

    @property
    def text(self) -> str:
        """Standard output, without the last line break."""
        return self.out.decode(errors="replace").rstrip("\n")

    @property
    def why(self) -> str:
        """The last line of standard error, or the exit code where there is none."""
        return _last_line(self.err) or f"exit code {self.rc}"


class Remote:
    """One host, to run commands on.

    Attributes:
        aborted: nothing more is to be done here.

    Args:
        host: of the inventory.
        sockets: a private directory where logins are shared; without it each command is
            a login of its own.
    """

    def __init__(self, host: Host, sockets: Path | None = None) -> None:
        self.host = host
        self._sockets = sockets
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self.aborted = threading.Event()

    @property
    def options(self) -> list[str]:
        """Of every ssh to this host."""
        host = self.host
        options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
        options += ["-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"]
        if host.ssh_config is not None:
            options += ["-F", str(host.ssh_config)]
        if host.user:
            options += ["-l", host.user]
        if host.port:
            options += ["-p", str(host.port)]
        if self._sockets is not None:
            options += ["-o", "ControlMaster=auto", "-o", "ControlPersist=60"]
            options += ["-o", f"ControlPath={self._sockets}/%C"]
        return options

    def run(
        self,
        command: Sequence[str],
        *,
        stdin: bytes | None = None,
        timeout: float = RUN_SECONDS,
        check: bool = False,
    ) -> Done:
        """Run a command on the host, and wait for it.

        Args:
            command: words, quoted for the shell there; ``~/`` at the beginning of one is its home.
            stdin: bytes for it; None is nothing.
            timeout: seconds.
            check: whether an exit code other than 0 is an error.

        Raises:
            HostError: the host cannot be reached, or does not answer in time; the line says what
                to do.
        """
        line = " ".join(quote(word) for word in command)
        done = self._call(["ssh", *self.options, "--", self.host.address, line], stdin, timeout)
        if done.rc == SSH_FAILED:
            raise HostError(self._failure(done))
        if check and done.rc != 0:
            raise HostError(f"{command[0]}: {done.why}")
        return done

    def path(self, path: str) -> str:
        """A path on the host, as ``rsync`` takes it."""
        address = f"[{self.host.address}]" if ":" in self.host.address else self.host.address
        return f"{address}:{path.removeprefix('~/') or '.'}"

    def rsync(self, arguments: Sequence[str], *, timeout: float = 3600.0) -> Done:
        """Run ``rsync`` with paths here and, by ``path``, there.

        Raises:
            HostError: it failed, or the host cannot be reached.
        """
        if shutil.which("rsync") is None:
            raise HostError("rsync is not installed on this machine: sudo apt install rsync")
        shell = shlex.join(["ssh", *self.options])
        done = self._call(["rsync", "-e", shell, *arguments], None, timeout)
        if done.rc != 0:
            raise HostError(self._failure(done))
        return done

    def stream(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a command whose output is read as it comes; for the caller to end.

        It holds the read end of a pipe as its standard input.
        """
        line = " ".join(quote(word) for word in command)
        return subprocess.Popen(  # noqa: S603
            ["ssh", *self.options, "--", self.host.address, line],  # noqa: S607
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def abort(self) -> None:
        """End what runs, and start nothing more."""
        with self._lock:
            self.aborted.set()
            for process in self._running:
                _kill(process)

    def close(self) -> None:
        """End the shared login."""
        if self._sockets is not None and any(self._sockets.iterdir()):
            command = ["ssh", *self.options, "-O", "exit", "--", self.host.address]
            subprocess.run(command, capture_output=True, check=False, timeout=10)  # noqa: S603

    def _call(self, command: list[str], stdin: bytes | None, timeout: float) -> Done:
        # Standard error is a file: the process that keeps the login would hold a pipe open.
        with tempfile.TemporaryFile() as err:
            with self._lock:
                if self.aborted.is_set():
                    raise HostError("interrupted")
                process = subprocess.Popen(  # noqa: S603
                    command,
                    stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=err,
                    start_new_session=True,  # Ctrl-C is ours: we end what has to end
                )
                self._running.add(process)
            try:
                out, _ = process.communicate(stdin, timeout)
            except subprocess.TimeoutExpired:
                raise HostError(f"no answer within {timeout:.0f} s") from None
            finally:
                if process.poll() is None:
                    _kill(process)
                    process.communicate()
                with self._lock:
                    self._running.discard(process)
            if self.aborted.is_set():
                raise HostError("interrupted")
            err.seek(0)
            return Done(process.returncode, out, err.read())

    def _failure(self, done: Done) -> str:
        said = done.err.decode(errors="replace").lower()
        at = f"{self.host.user}@{self.host.address}" if self.host.user else self.host.address
        mending = next((mend for what, mend in MENDING.items() if what in said), "")
        return f"{done.why}: {mending.format(at=at)}" if mending else done.why


def quote(word: str) -> str:
    """A word for the shell of a host; ``~/`` at its beginning stays the home there."""
    if word == "~":
        return word
    return f"~/{shlex.quote(word[2:])}" if word.startswith("~/") else shlex.quote(word)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children, such as the ssh of an rsync: the session is its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


@contextmanager
def remotes(hosts: Iterable[Host]) -> Iterator[list[Remote]]:
    """Hosts to run commands on, with one login each, which ends with the block."""
    with ExitStack() as stack:
        # A short path: that of a socket may have some 100 bytes, and %C with ssh's suffix is 57.
        sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="seedwire-", dir="/tmp"))
        made = [Remote(host, Path(sockets)) for host in hosts]
        for remote in made:
            stack.callback(remote.close)
        yield made
