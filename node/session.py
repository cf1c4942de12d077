"""A node's life: log in, load, take jobs, send outcomes, survive a lost connection, leave.

This thread only talks; ``engine`` computes.  So a heartbeat is never stuck behind a
forward pass, and a node that trains for ten minutes is never taken for dead.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from node.address import facing
from node.beats import Beats
from node.engine import Engine, Outcome, Setup
from node.machine import Machine
from node.uploads import Uploads
from protocol import experiment as experiments
from protocol.blobs import INLINE_BYTES, Inbox, Outbox
from protocol.channel import read_refusal, to_node
from protocol.channel import to_coordinator as outward
from protocol.dealer import Dealer
from protocol.errors import NetworkError, RefusedError
from protocol.experiment import Nodes
from protocol.keys import Identity
from protocol.messages import (
    LOADING,
    WAITING,
    Beat,
    Bye,
    Carrier,
    Chunk,
    Enrolled,
    Evaluate,
    Hello,
    Message,
    Pull,
    Ready,
    Reduce,
    Refuse,
    Reject,
    Step,
    Task,
    ToCoordinator,
    Update,
    Welcome,
)
from protocol.noise import STREAM
from protocol.notify import Notifier
from protocol.parts import Cost
from protocol.wire import MAX_ARRAY, Frame, RemoteProtocolError, VersionError

log = logging.getLogger(__name__)

MAX_BACKOFF_SECONDS = 30.0
MAX_JOBS = 2 * MAX_ARRAY  # a task for each client that a node can host, and steps
VITALS_SECONDS = 10.0  # between two looks at them, which take bytes and up to 0.1 s
COORDINATOR = b""  # the one peer


@dataclass
class _Job:
    """A job in the order received; a step may still be waiting for its payload."""

    message: Carrier | Task | Reduce | Evaluate
    data: Frame | None = None
    is_whole: bool = True
    since: float = 0.0  # announced


class Session:
    """One node process.

    Args:
        endpoint: the coordinator's, ``tcp://HOST:PORT``.
        name: this node's identity.
        software: our version, which must equal the coordinator's.
        setup: what it was started with.
        give_up_seconds: how long to look for the coordinator before it is an error; 0
            is for ever.
        identity: its keys, and whom it trusts; without, nothing is encrypted.
        notifier: where systemd is told; by default the process's.
        make_engine: tests put a scripted one here.
    """

    def __init__(
        self,
        endpoint: str,
        name: str,
        software: str,
        setup: Setup,
        give_up_seconds: float = 0.0,
        make_engine: Callable[..., Engine] = Engine,
        identity: Identity | None = None,
        notifier: Notifier | None = None,
    ) -> None:
        self._endpoint, self._setup = endpoint, setup
        self._notifier = notifier or Notifier()
        self._give_up_seconds, self._make_engine = give_up_seconds, make_engine
        self._hello = Hello(
            node=name,
            software=software,
            stream=STREAM,
            clients=setup.clients,
            role="evaluate" if setup.evaluates else "train",
            host=platform.node(),
            pid=os.getpid(),
            limits=setup.limits,
            login=time.time_ns() // 1_000_000,  # past any of an earlier process, even of our pid
        )
        self._machine = Machine()
        self._vitals_at = -math.inf
        self._transfer_seconds = 0.0  # of payloads pulled since the last update
        self._uploads = Uploads(time.monotonic)
        self._dealer = Dealer(endpoint, identity)
        self._nodes = Nodes()
        self._engine: Engine | None = None
        self._run_id = ""
        self._is_in = False  # logged in on this connection
        self._heard = self._lost_at = time.monotonic()
        self._beat_at = 0.0
        self._beats = Beats(LOADING)
        self._backoff = 0.5
        self._jobs: deque[_Job] = deque()
        self._outbox, self._inbox = Outbox(), Inbox[_Job](time.monotonic)
        self._offered: dict[tuple[int, int, int], int] = {}  # round, attempt, client -> blob
        self._finished = False

    def run(self) -> None:
        """Work until the run is over.

        Raises:
            RefusedError: the coordinator turned this node away.
            NetworkError: the coordinator was not to be found for ``give_up_seconds``.
            SeedwireError: model or data could not be loaded.
        """
        self._log_in()
        while not self._finished:
            now = time.monotonic()
            frames = self._dealer.recv(max(0.0, self._next_due() - now))
            if frames is not None:
                self._receive(frames)
            for outcome in self._engine.take() if self._engine else []:
                self._send_out(outcome)
            self._uploads.look(self._dealer, self._outbox)
            self._keep_alive()
            self._notifier.turn(self._status(), is_ready=self._is_in)

    def leave(self, reason: str) -> bool:
        """Say goodbye and close; False when a job is still running in its thread."""
        self._notifier.stopping(reason or "the run is over")
        if self._is_in and not self._finished:
            self._send(Bye(reason=reason))
        is_idle = self._engine is None or self._engine.stop(0.5)
        self._dealer.close()
        return is_idle

    # --- staying connected -------------------------------------------------------

    def _next_due(self) -> float:
        quiet = self._heard + (self._nodes.patience_seconds if self._is_in else self._backoff)
        beat_at = self._beat_at + self._nodes.heartbeat_seconds
        return min(quiet, beat_at, self._uploads.next_look(), self._notifier.due)

    def _status(self) -> str:
        """What this node does, for people."""
        engine = self._engine
        if not self._is_in or engine is None:
            return f"looking for a coordinator at {self._endpoint}"
        done = f", {p.done} of {p.total}" if (p := engine.progress) else ""
        return f"run {self._run_id}: {engine.busy or 'waiting for work'}{done}"

    def _keep_alive(self) -> None:
        now = time.monotonic()
        if self._is_in and now >= self._beat_at + self._nodes.heartbeat_seconds:
            self._beat_at = now
            e = self._engine
            self._send(self._beats.next(e.busy or WAITING, e.progress, now) if e else Beat())
        patience = self._nodes.patience_seconds if self._is_in else self._backoff
        is_closed = self._dealer.lost_one() and self._is_in
        if is_closed or now >= self._heard + patience:
            self._reconnect(now)
        elif not self._is_in:
            self._beat_at = now

    def _reconnect(self, now: float) -> None:
        """A fresh connection and another login, less and less often."""
        if self._is_in:
            log.warning("lost the coordinator at %s; looking for it again", self._endpoint)
            self._is_in, self._lost_at, self._backoff = False, now, 0.5
            self._forget_transfers()
        away = now - self._lost_at
        if self._give_up_seconds and away > self._give_up_seconds:
            raise NetworkError(f"no coordinator at {self._endpoint} for {away:.0f} s")
        if self._backoff > 2:
            log.info("no coordinator at %s yet (%.0f s)", self._endpoint, away)
        jitter = random.uniform(0.75, 1.25)  # noqa: S311 - so that nodes do not come all at once
        self._backoff = min(MAX_BACKOFF_SECONDS, 1.5 * self._backoff * jitter)
        self._heard = now
        self._dealer.reconnect()
        self._log_in()

    def _log_in(self) -> None:
        group, login = self._machine.group(), self._hello.login + 1
        self._hello = msgspec.structs.replace(
            self._hello, login=login, memory_limit=group.limit, oom_kills=group.kills
        )
        self._send(self._hello)

    def _forget_transfers(self) -> None:
        """What was on its way on the old connection is asked for anew."""
        self._inbox.forget(COORDINATOR)
        self._outbox, self._offered = Outbox(), {}
        self._uploads.forget()
        self._jobs.clear()

    # --- messages ----------------------------------------------------------------

    def _receive(self, frames: list[bytes]) -> None:
        try:
            message, buffer = to_node.unpack(frames)
        except VersionError as error:
            refusal = read_refusal(frames)
            why = refusal.reason if refusal else f"{error}: install the same seedwire on both"
            raise RefusedError(why) from error
        except RemoteProtocolError as error:
            log.warning("dropped a message of the coordinator: %s", error)
            return
        self._heard = time.monotonic()
        match message:
            case Beat() | Enrolled():
                pass
            case Welcome():
                self._welcome(message)
            case Refuse(code="login"):
                if self._is_in:  # else it answers what was sent before the last login
                    self._is_in = False
                    self._forget_transfers()
                    self._log_in()
            case Refuse(reason=reason):
                raise RefusedError(reason)
            case Step() | Task() | Reduce() | Evaluate():
                self._queue(message, buffer)
            case Chunk():
                self._chunk(message, buffer)
            case Pull():
                self._answer(message)
            case Reject(client=client, round=number, reason=reason):
                log.warning("update of client %d, round %d rejected: %s", client, number, reason)
                self._withdraw((number, message.attempt, client))
            case Bye(finished=finished, reason=reason):
                log.info("the coordinator says goodbye: %s", reason)
                self._finished, self._is_in = finished, False

    def _welcome(self, welcome: Welcome) -> None:
        self._is_in, self._backoff, self._beats = True, 0.5, Beats(LOADING)
        experiment = experiments.convert(welcome.experiment, "experiment from the coordinator")
        self._nodes = experiment.nodes
        if self._engine is None or welcome.run != self._run_id:
            log.info("logged in to run %s as %s", welcome.run, self._hello.node)
            self._run_id = welcome.run
            if self._engine is not None:
                self._engine.stop(0.0)
            setup = replace(self._setup, run=welcome.run)
            self._engine = self._make_engine(experiment, setup, self._dealer.wake)
        elif self._engine.ready is not None:
            log.info("back in run %s", welcome.run)
            self._send_out(self._engine.ready)

    def _queue(self, message: Step | Task | Reduce | Evaluate, buffer: Frame | None) -> None:
        if len(self._jobs) >= MAX_JOBS:  # behind a step that does not come
            log.warning("dropped a %s: too many wait already", type(message).__name__.lower())
            return
        job = _Job(message, buffer)
        if isinstance(message, Step) and message.blob is not None and message.payload is not None:
            nbytes = message.payload.nbytes
            try:
                pulls = self._inbox.open(COORDINATOR, message.blob, nbytes, job)
            except (RemoteProtocolError, MemoryError) as error:
                log.warning("dropped a step of %d bytes: %s", nbytes, error)
                return
            job.is_whole, job.since = False, time.monotonic()
            for pull in pulls:
                self._send(pull)
        self._jobs.append(job)
        self._flush()

    def _chunk(self, chunk: Chunk, buffer: Frame | None) -> None:
        try:
            pulls, arrived = self._inbox.take(COORDINATOR, chunk, buffer)
        except RemoteProtocolError as error:
            log.warning("dropped a chunk: %s", error)
            return
        for pull in pulls:
            self._send(pull)
        if arrived is not None:
            arrived.item.data, arrived.item.is_whole = arrived.data, True
            self._transfer_seconds += time.monotonic() - arrived.item.since
            self._flush()

    def _answer(self, pull: Pull) -> None:
        try:
            self._send(*self._outbox.answer(pull))
        except RemoteProtocolError as error:
            log.warning("dropped a pull: %s", error)

    def _flush(self) -> None:
        """Hand on what is whole, in the order received: a step before the task that needs it."""
        while self._jobs and self._jobs[0].is_whole and self._engine is not None:
            job = self._jobs.popleft()
            self._engine.submit(job.message, job.data)

    def _send_out(self, outcome: Outcome) -> None:
        if not self._is_in:
            return  # the coordinator will ask again at the next login
        message, data = self._with_vitals(outcome.message), outcome.data
        if data is not None and len(data) > INLINE_BYTES:
            blob = self._outbox.put(data, once=True)
            message, data = msgspec.structs.replace(message, blob=blob), None
        began = time.monotonic()
        self._send(message, data)
        if isinstance(message, Ready):
            self._beats = Beats(WAITING)
        elif isinstance(message, Update):
            self._uploads.began(began, message.blob)
            if message.blob is not None:
                self._offered = {p: b for p, b in self._offered.items() if self._outbox.holds(b)}
                self._offered[message.round, message.attempt, message.client] = message.blob

    def _withdraw(self, place: tuple[int, int, int]) -> None:
        """Let go of an update that nobody will pull."""
        blob = self._offered.pop(place, None)
        if blob is not None:
            self._outbox.drop(blob)
            self._uploads.withdraw(blob)

    def _with_vitals(self, message: Message) -> Message:
        """With what this thread has measured, where there is a place for it."""
        if isinstance(message, Update) and self._transfer_seconds:
            spent = Cost("transfer", self._transfer_seconds)
            message = msgspec.structs.replace(message, costs=(*message.costs, spent))
            self._transfer_seconds = 0.0
        if isinstance(message, Update) and (seconds := self._uploads.take()) is not None:
            costs = (*message.costs, Cost("upload", seconds))
            message = msgspec.structs.replace(message, costs=costs)
        if isinstance(message, Ready) and message.meeting is not None:
            # how we reach the coordinator is how others on its network reach us
            address = facing(self._endpoint) or message.meeting.address
            meeting = msgspec.structs.replace(message.meeting, address=address)
            message = msgspec.structs.replace(message, meeting=meeting)
        now = time.monotonic()
        if isinstance(message, Ready | Update) and now >= self._vitals_at + VITALS_SECONDS:
            self._vitals_at = now
            vitals = self._machine.vitals(self._dealer.traffic())
            message = msgspec.structs.replace(message, vitals=vitals)
        return message

    def _send(self, message: ToCoordinator | object, buffer: Frame | None = None) -> None:
        if not self._dealer.send(outward.pack(message, buffer)):  # type: ignore[arg-type]
            log.warning("the connection takes nothing; %s dropped", type(message).__name__)
