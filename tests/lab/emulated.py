"""A lab of a test: its file, its commands, and what may be left of it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from deploy.lab.lab import label, missing

# two tests at once, of two people, do not meet
NETWORK = f"10.{64 + os.getpid() % 64}.{os.getpid() // 64 % 256}.0/24"


def marks(timeout_seconds: int) -> list[pytest.MarkDecorator]:
    """Of a file whose tests need a lab: where none can be, each says why it is skipped."""
    why = missing()
    return [
        pytest.mark.lab,
        pytest.mark.timeout(timeout_seconds),
        pytest.mark.skipif(why is not None, reason=f"{why}"),
    ]


@dataclass
class Emulated:
    """A lab by its file, which need not be up."""

    file: Path

    @property
    def directory(self) -> Path:
        return self.file.with_suffix("")

    def command(self, *arguments: str) -> list[str]:
        file = ["--file"] if arguments[0] in ("cut", "mend") else []
        return [sys.executable, "-m", "seedwire", "lab", *arguments, *file, str(self.file)]

    def seedwire(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``seedwire lab`` with arguments, on this lab."""
        return subprocess.run(
            self.command(*arguments), capture_output=True, text=True, check=False, timeout=120
        )

    def ssh(self, host: str, command: str) -> subprocess.CompletedProcess[str]:
        """A command on a host."""
        line = ["ssh", "-F", str(self.directory / "ssh_config"), host, command]
        return subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)

    def says(self, host: str, command: str) -> str:
        done = self.ssh(host, command)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def things(self) -> set[str]:
        """What it has on this machine, or has left there, in its names."""
        ours = f"{label(self.directory)}*"
        found = {f"namespace {p.name}" for p in Path("/run/netns").glob(ours)}
        found |= {f"link {p.name}" for p in Path("/sys/class/net").glob(ours)}
        for pattern in ("*", "*/*", "*/*/*"):
            groups = Path("/sys/fs/cgroup").glob(f"{pattern}/{ours}")
            found |= {f"group {p}" for p in groups if p.is_dir()}
        return found

    def row(self, host: str) -> dict[str, str]:
        """A host's line of ``lab status``, by the table's head."""
        lines = self.seedwire("status").stdout.replace(" MB", "MB").splitlines()
        rows = [dict(zip(lines[0].split(), line.split(), strict=True)) for line in lines[1:]]
        return next(row for row in rows if row["host"] == host)


def is_alive(process: psutil.Process) -> bool:
    """Not one that has ended, and that this machine's init has not asked for yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def processes(directory: Path) -> list[psutil.Process]:
    """Those that have to do with a lab: by their command, directory or open log."""
    found = []
    for process in psutil.process_iter():
        try:
            facts = [*process.cmdline(), process.cwd(), *(f.path for f in process.open_files())]
        except psutil.Error:
            continue
        if any(str(directory) in fact for fact in facts):
            found.append(process)
    return found
