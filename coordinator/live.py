"""What a run is doing just now, in one small file for whoever watches it.

``status.json`` is replaced as a whole, once a second at the most, and once more when the
coordinator ends; its keys are described in ``docs/summary.md``.  What others show of a
run is read by ``coordinator.status``, from this file and the rest of the run directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec import structs

from coordinator import totals
from coordinator.cohort import waited_for
from coordinator.record import RunRecorder
from coordinator.roster import Member
from coordinator.server import Server
from coordinator.state import Evaluating, Finished, Gathering, Policy, State, Training
from protocol.tcp import Traffic

LIVE_VERSION = 1
PERIOD_SECONDS = 1.0


class Live:
    """Writes ``status.json`` while a run goes on.

    Args:
        wall: seconds since the epoch; the server's own clock is monotonic.
    """

    def __init__(
        self, server: Server, recorder: RunRecorder, wall: Callable[[], float] = time.time
    ) -> None:
        self._server, self._recorder, self._wall = server, recorder, wall
        self._path = recorder.directory / "status.json"
        self._written_at = float("-inf")

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *exc: object) -> None:
        self.update(is_last=True)

    def update(self, is_last: bool = False) -> bool:
        """Write the file if it is due; says whether it did."""
        now = self._server.now()
        if now < self._written_at + PERIOD_SECONDS and not is_last:
            return False
        self._written_at = now
        with contextlib.suppress(OSError):  # a full disk is the journal's to tell
            write_whole(self._path, json.dumps(self.snapshot()) + "\n")
        return True

    def snapshot(self) -> dict[str, Any]:
        """What the file says."""
        server, recorder, state = self._server, self._recorder, self._server.state
        policy = server.settings.policy
        return {
            "version": LIVE_VERSION,
            "at": self._wall(),
            "host": platform.node(),
            "pid": os.getpid(),
            "rounds": policy.rounds,
            "clients": policy.clients,
            "round": state.round,
            "phase": type(state.phase).__name__.lower(),
            **self._phase(state, policy),
            "bytes": totals.nbytes(recorder.account, recorder.meter),
            "rejected": dict(recorder.account.num_rejected),
            "resyncs": recorder.account.num_resyncs,
            "nodes": self._nodes(),
        }

    def _phase(self, state: State, policy: Policy) -> dict[str, Any]:
        """Who or what is waited for, and since and until when."""
        now = self._server.now()
        match state.phase:
            case Training(opened_at=opened, closes_at=closes) as phase:
                waiting = sorted(waited_for(state, phase, policy, now))
                return {
                    "seconds": now - opened,
                    "deadline_seconds": closes - opened,
                    "attempt": state.attempt,
                    "cohort": list(phase.cohort),
                    "arrived": len(phase.refs),
                    "waiting": [{"client": c, "node": self._host(c)} for c in waiting],
                }
            case Gathering(since=since):
                return {"seconds": now - since, "lacks": self._lacks(state, policy)}
            case Evaluating():
                return {}
            case Finished(reason=reason):
                return {"reason": reason, "ended": state.ended}
            case _:
                return {}

    def _lacks(self, state: State, policy: Policy) -> str:
        """What keeps the next round from opening."""
        loading = [m.name for m in self._server.desk.roster if m.trains and m.version is None]
        if not state.evaluator:
            return "the evaluation worker to load model and data"
        if loading:
            return f"{', '.join(sorted(loading))} to load model and data"
        if absent := sorted(set(range(policy.clients)) - state.hosted):
            return f"nodes that host clients {spans(absent)}"
        return "the next round"

    def _host(self, client: int) -> str | None:
        host = self._server.desk.roster.host_of(client)
        return host.name if host else None

    def _nodes(self) -> list[dict[str, Any]]:
        """Every node that is here, and every one that was and left bytes behind."""
        counts, traffic = self._counts(), self._recorder.meter.traffic
        here = {member.name: member for member in self._server.desk.roster}
        return [
            {
                "node": name,
                **(self._member(here[name]) if name in here else {"doing": "gone"}),
                "bytes": counts[name],
                **({"tcp": _tcp(traffic[name])} if name in traffic else {}),
            }
            for name in sorted({*here, *counts})
        ]

    def _member(self, member: Member) -> dict[str, Any]:
        progress = member.progress
        return {
            "host": member.hello.host,
            "role": member.hello.role,
            "clients": list(member.hello.clients),
            "doing": member.busy,
            "progress": progress and structs.asdict(progress),
            "silent_seconds": self._server.now() - member.seen,
            "memory_bytes": dict(member.peaks),
        }

    def _counts(self) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
        """Bytes by node, level, kind and direction."""
        table: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
        meter = self._recorder.meter
        for level, counts in (("payload", meter.payload), ("message", meter.message)):
            for key, count in counts.items():
                table[key.node][level][key.kind][key.way] = count
        return table


def _tcp(traffic: Traffic) -> dict[str, Any]:
    """What the kernel says of a node's connections; the coordinator's end sends down."""
    counts = traffic._asdict()
    return {"up": counts.pop("received"), "down": counts.pop("sent"), **counts}


def spans(clients: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    found: list[list[int]] = []
    for client in sorted(clients):
        if found and client == found[-1][1] + 1:
            found[-1][1] = client
        else:
            found.append([client, client])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def write_whole(path: Path, text: str) -> None:
    """A reader sees the whole file or the one before it."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
