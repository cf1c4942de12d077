"""In the test: hears where each process is, and strikes where the script says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socketserver
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tests.faults.faults import (
    BitFlip,
    Cut,
    Duplicate,
    Fault,
    HalfOpen,
    Hoard,
    Hold,
    Jump,
    Kill,
    Miscount,
    Moment,
    Partition,
    Poison,
    Reorder,
    Slow,
    Stop,
    Truncate,
)
from tests.faults.link import Links


class Cables(Protocol):
    """What machines are connected with."""

    def unplug(self, name: str) -> None: ...
    def plug(self, name: str) -> None: ...


class Director:
    """Runs a script.

    Args:
        script: each fault strikes once, at its moment.
        links: of the processes whose connection can be interfered with.
        cables: what a partition pulls out, where it is not those links.

    Attributes:
        address: where processes announce themselves; a path, which crosses network namespaces.
        struck: when each fault has, in order, by ``time.monotonic``.
        seen: every moment, in order.
    """

    def __init__(
        self, script: Sequence[Fault], links: Links | None = None, cables: Cables | None = None
    ) -> None:
        self._script, self._links = list(script), links or Links()
        self._cables = cables or self._links
        self.struck: dict[Fault, float] = {}
        self.seen: list[Moment] = []
        self._times: Counter[Fault] = Counter()
        self._lock = threading.Lock()
        self._happened = threading.Condition(self._lock)
        self._is_open = True
        self._timers: list[threading.Timer] = []
        self._folder = tempfile.mkdtemp(prefix="seedwire-")  # the path of a socket must be short
        self.address = str(Path(self._folder) / "director")
        self._server = _Server(self.address, self._serve)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Let nobody wait any more."""
        for timer in self._timers:
            timer.cancel()
        with self._lock:
            self._is_open = False
            self._happened.notify_all()
        self._server.shutdown()
        self._server.server_close()
        shutil.rmtree(self._folder)

    @property
    def missed(self) -> list[Fault]:
        """The faults whose moment never came."""
        return [fault for fault in self._script if fault not in self.struck]

    def _serve(self, moment: Moment) -> dict[str, float]:
        """What a process is told at a moment; it waits for that."""
        with self._lock:
            self.seen.append(moment)
            self._happened.notify_all()
            due = [fault for fault in self.missed if moment.meets(fault)]
            self._times.update(due)
            due = [fault for fault in due if self._times[fault] == fault.nth]
            self.struck |= dict.fromkeys(due, moment.at)
        orders: dict[str, float] = {}
        for fault in due:
            orders |= self._strike(fault, moment)
        return orders

    def _strike(self, fault: Fault, moment: Moment) -> dict[str, float]:
        match fault.act:
            case Kill():
                os.kill(moment.pid, signal.SIGKILL)
            case Stop(seconds):
                os.kill(moment.pid, signal.SIGSTOP)
                self._later(seconds, lambda: os.kill(moment.pid, signal.SIGCONT))
            case Cut():
                self._links[fault.who].cut()
            case HalfOpen():
                self._links[fault.who].freeze()
            case Partition(seconds):
                self._cables.unplug(fault.who)
                self._later(seconds, lambda: self._cables.plug(fault.who))
            case Hold(who, phase, times):
                where = who, phase, moment.round
                with self._lock:
                    self._happened.wait_for(
                        lambda: not self._is_open or self._count(where) >= times
                    )
            case Slow(bytes_per_second):
                self._links[fault.who].bytes_per_second = bytes_per_second
            case Truncate() | BitFlip():
                self._links[fault.who].damage = type(fault.act)
            case Duplicate() | Reorder() | Poison():
                return {type(fault.act).__name__.lower(): 1.0}
            case Jump(seconds):
                return {"jump": seconds}
            case Hoard(nbytes) | Miscount(nbytes):
                return {type(fault.act).__name__.lower(): nbytes}
        return {}

    def _count(self, where: tuple[str, str, int]) -> int:
        return sum((m.who, m.phase, m.round) == where for m in self.seen)

    def _later(self, seconds: float, do: Any) -> None:
        timer = threading.Timer(seconds, do)
        timer.daemon = True
        self._timers.append(timer)
        timer.start()


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: str, serve: Any) -> None:
        self.serve = serve
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A process that was killed does not read the answer."""
        del request, client_address


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        line = self.rfile.readline()
        if line:
            assert isinstance(self.server, _Server)
            orders = self.server.serve(Moment(**json.loads(line), at=time.monotonic()))
            self.wfile.write(json.dumps(orders).encode() + b"\n")
