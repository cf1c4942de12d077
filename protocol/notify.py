"""What systemd is told of a process: sd_notify(3), a datagram of a few lines each.

Without systemd (no ``$NOTIFY_SOCKET``) nothing is told and nothing is due.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections.abc import Callable, MutableMapping

STATUS_LETTERS = 200


class Notifier:
    """The line to systemd, which children do not inherit.

    Args:
        environment: of the process; what systemd put there for it alone is taken out.
        clock: a monotonic one.
    """

    def __init__(
        self,
        environment: MutableMapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        address = environment.pop("NOTIFY_SOCKET", "")
        micros = environment.pop("WATCHDOG_USEC", "")
        whose = environment.pop("WATCHDOG_PID", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address  # abstract
        is_watched = address and micros.isdigit() and whose in ("", str(os.getpid()))
        self._beat_seconds = int(micros) / 2e6 if is_watched else math.inf  # twice as often
        self._clock, self._is_ready, self._status = clock, False, ""
        self.due = clock() if is_watched else math.inf

    def turn(self, status: str, is_ready: bool) -> None:
        """The process's loop has come round: what it does now, and whether it is up.

        To be called no later than ``due``, on the same clock; a loop that hangs does not, and is
        restarted.
        """
        lines = []
        if self._clock() >= self.due:
            self.due = self._clock() + self._beat_seconds
            lines.append("WATCHDOG=1")
        if is_ready and not self._is_ready:
            self._is_ready = True
            lines.append("READY=1")
        status = " ".join(status.split())[:STATUS_LETTERS]
        if status != self._status:
            self._status = status
            lines.append(f"STATUS={status}")
        self._tell(lines)

    def stopping(self, status: str) -> None:
        """It has begun to end, and is not to be taken for hung."""
        self._tell(["STOPPING=1", f"STATUS={' '.join(status.split())[:STATUS_LETTERS]}"])

    def _tell(self, lines: list[str]) -> None:
        if not self._address or not lines:
            return
        kind = (socket.AF_UNIX, socket.SOCK_DGRAM)
        with contextlib.suppress(OSError), socket.socket(*kind) as datagrams:  # nobody may listen
            datagrams.sendto("\n".join(lines).encode(), self._address)
