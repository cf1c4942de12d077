"""Memory control groups with a limit, of version 2 or 1, for processes of a test."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


class NoGroupError(Exception):
    """Here none can be made; says why."""


class Group:
    """A group that lasts until it is closed, which is when it is empty.

    Args:
        name: of its directory; unique on this machine.
        limit: bytes that its processes may have, swap included.

    Raises:
        NoGroupError: the kernel has no such groups, or they are not for us to make.
    """

    def __init__(self, name: str, limit: int) -> None:
        is_new = (V2 / "cgroup.controllers").exists()
        self.path = (V2 if is_new else V1) / name
        try:
            if is_new:
                (V2 / "cgroup.subtree_control").write_text("+memory")
            elif not V1.is_dir():
                raise NoGroupError(f"no memory groups: {V1} is not there")
            self.path.mkdir()
            most = "memory.max" if is_new else "memory.limit_in_bytes"
            (self.path / most).write_text(str(limit))
            swap, none = (
                ("memory.swap.max", 0) if is_new else ("memory.memsw.limit_in_bytes", limit)
            )
            with contextlib.suppress(OSError):  # a kernel that does not account for swap
                (self.path / swap).write_text(str(none))
        except OSError as error:
            self.close()
            raise NoGroupError(f"no memory groups: {error}") from error

    def close(self) -> None:
        """Remove it, once its processes are gone."""
        with contextlib.suppress(OSError):
            self.path.rmdir()


def enter(path: Path) -> None:
    """Put this process into a group."""
    (path / "cgroup.procs").write_text(str(os.getpid()))
