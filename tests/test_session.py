"""A node's talk with its coordinator: real sockets on loopback, a scripted worker."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
import pytest

from node.engine import Engine, Outcome, Setup
from node.session import Session
from protocol.blobs import CHUNK_BYTES, WINDOW, Inbox, Outbox
from protocol.channel import to_coordinator, to_node
from protocol.dealer import Dealer
from protocol.errors import ModelError, NetworkError, RefusedError
from protocol.experiment import Experiment
from protocol.messages import (
    Beat,
    Bye,
    Chunk,
    Evaluate,
    Hello,
    Message,
    Pull,
    Ready,
    Refuse,
    Reject,
    Step,
    Task,
    Update,
    Welcome,
)
from protocol.noise import STREAM
from protocol.parts import Cost, TensorInfo
from protocol.payload import DenseSpec
from protocol.router import Router
from protocol.wire import VERSION, Frame, Peer
from tests.fakes import Blocker, ScriptedWorker, refusing

pytestmark = pytest.mark.net

M = TypeVar("M", bound=Message)
WITHIN_SECONDS = 20.0
DIGEST = bytes(16)
HELD = Ready(version=0, digest=DIGEST, space=DIGEST)
FIRST = Outcome(msgspec.structs.replace(HELD, costs=(Cost("load", 1.0),)))
FOUNDING = Outcome(
    msgspec.structs.replace(HELD, tensors=(TensorInfo("t", (2,), "u"),), payload=DenseSpec(2)),
    memoryview(bytes(8)),
)
TABLE: dict[str, Any] = {
    "run": {"name": "test"},
    "model": {"id": "random:x"},
    "data": {"id": "x.csv"},
    "rounds": {"count": 1},
    "method": {"name": "fedavg"},
}
HASTY: dict[str, Any] = {"heartbeat_seconds": 0.1, "patience_seconds": 0.4}
LARGE = (WINDOW + 1) * CHUNK_BYTES + 12


def data_of(nbytes: int) -> memoryview:
    return memoryview((b"0123456789" * (nbytes // 10 + 1))[:nbytes])


def task(client: int = 0, version: int = 0) -> Task:
    return Task(round=1, attempt=0, client=client, version=version)


def step(nbytes: int = 8) -> Step:
    return Step(version=1, round=1, digest=DIGEST, payload=DenseSpec(nbytes // 4))


def update(of: Task, nbytes: int = 8) -> Outcome:
    where: dict[str, Any] = {"round": of.round, "attempt": of.attempt, "client": of.client}
    spec = DenseSpec(nbytes // 4)
    return Outcome(Update(**where, examples=3, loss=0.5, payload=spec), data_of(nbytes))


def trains(message: Message, data: Frame | None) -> Outcome | None:
    return update(message) if isinstance(message, Task) else None


class Coordinator:
    """The other end, by hand, and the session in a thread."""

    def __init__(self) -> None:
        self.router = Router("tcp://127.0.0.1:*")
        self.peer = Peer(b"")
        self.spare: deque[Message] = deque()
        self.workers: list[ScriptedWorker] = []
        self._pool = ThreadPoolExecutor(1)
        self._living: Future[bool] | None = None

    def start(
        self,
        answer: Callable[[Message, Frame | None], Outcome | None] = trains,
        first: Outcome = FIRST,
        make: Any = None,
        setup: Setup = Setup((0, 1)),  # noqa: B008 - frozen
        **options: Any,
    ) -> Coordinator:
        def scripted(*_: Any) -> Any:
            self.workers.append(ScriptedWorker(answer, first, HELD))
            return self.workers[-1]

        def engine(experiment: Experiment, setup: Setup, wake: Callable[[], None]) -> Engine:
            return Engine(experiment, setup, wake, make or scripted)

        def live() -> bool:
            endpoint = options.pop("endpoint", self.router.endpoint)
            session = Session(endpoint, "a", "1.0", setup, make_engine=engine, **options)
            try:
                session.run()
            finally:
                was_idle = session.leave("the test is over")
            return was_idle

        self._living = self._pool.submit(live)
        return self

    def ended(self) -> bool:
        """Wait for the session's end; raises what it raised."""
        assert self._living is not None
        return self._living.result(WITHIN_SECONDS)

    def hear(self) -> tuple[Message, Frame | None]:
        """The next message of any peer, who is then the one we speak to."""
        while (got := self.router.recv(WITHIN_SECONDS)) is None:
            assert self.router.lost_one(), "the node says nothing"
        self.peer = got[0]
        return to_coordinator.unpack(got[1])

    def expect(self, kind: type[M]) -> tuple[M, Frame | None]:
        """The next message, heartbeats aside, which must be of a kind."""
        while True:
            message, buffer = self.hear()
            if isinstance(message, kind):
                return message, buffer
            assert isinstance(message, Beat), f"{message} instead of {kind.__name__}"

    def say(self, message: Any, buffer: Frame | None = None) -> None:
        assert self.router.send(self.peer, to_node.pack(message, buffer))

    def welcome(self, run: str = "run-1", **nodes: float) -> None:
        self.expect(Hello)
        self.say(Welcome(run=run, experiment=TABLE | {"nodes": nodes}))

    def dismiss(self) -> None:
        self.say(Bye(reason="complete", finished=True))
        assert self.ended()

    def close(self) -> None:
        if self._living is not None and not self._living.done():
            self.say(Bye(finished=True))
            self.ended()
        self._pool.shutdown()
        self.router.close()


@pytest.fixture
def c() -> Iterator[Coordinator]:
    coordinator = Coordinator()
    yield coordinator
    coordinator.close()


# --- work ------------------------------------------------------------------------


def test_it_logs_in_says_what_it_is_and_is_ready(c: Coordinator) -> None:
    hello, _ = c.start().expect(Hello)
    assert (hello.node, hello.software, hello.stream) == ("a", "1.0", STREAM)
    assert (hello.clients, hello.role, hello.pid) == ((0, 1), "train", os.getpid())
    c.say(Welcome(run="run-1", experiment=TABLE))
    ready, _ = c.expect(Ready)
    assert ready.vitals is not None
    assert msgspec.structs.replace(ready, vitals=None) == FIRST.message
    c.dismiss()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel says no bytes")
def test_vitals_come_with_the_first_message_that_has_room_and_then_seldom(c: Coordinator) -> None:
    c.start().welcome()
    ready, _ = c.expect(Ready)
    assert ready.vitals is not None
    assert ready.vitals.sent is not None
    assert ready.vitals.sent > 100  # what it has said so far, greeting included
    assert ready.vitals.received is not None
    assert ready.vitals.rtt is not None
    c.say(task())
    assert c.expect(Update)[0].vitals is None
    c.dismiss()


def test_an_evaluator_says_so_and_brings_its_parameters(c: Coordinator) -> None:
    c.start(first=FOUNDING, setup=Setup((), evaluates=True))
    hello, _ = c.expect(Hello)
    assert hello.role == "evaluate"
    c.say(Welcome(run="run-1", experiment=TABLE))
    ready, buffer = c.expect(Ready)
    assert (msgspec.structs.replace(ready, vitals=None), buffer) == (FOUNDING.message, bytes(8))


def test_a_task_gives_an_update(c: Coordinator) -> None:
    c.start().welcome()
    c.expect(Ready)
    for client in (1, 0):
        c.say(task(client))
        assert c.expect(Update) == (update(task(client)).message, data_of(8))
    c.dismiss()
    assert [job for job, _ in c.workers[0].jobs] == [task(1), task(0)]


def test_a_large_step_is_pulled_and_comes_before_the_task_that_needs_it(c: Coordinator) -> None:
    c.start().welcome()
    c.expect(Ready)
    outbox, data = Outbox(), data_of(LARGE)
    announced = msgspec.structs.replace(step(LARGE), blob=outbox.put(data))
    c.say(announced)
    c.say(task(0, version=1))  # at once; it has to wait
    pulls = [c.expect(Pull)[0] for _ in range(WINDOW)]
    for pull in pulls:
        c.say(*outbox.answer(pull))
    while pulls[-1].offset + pulls[-1].nbytes < LARGE:  # how many follow depends on the time
        pulls.append(c.expect(Pull)[0])
        c.say(*outbox.answer(pulls[-1]))
    c.expect(Update)
    c.dismiss()
    (first, second) = c.workers[0].jobs
    assert first[0] == announced
    assert first[1] == data
    assert second == (task(0, version=1), None)


def test_a_step_that_is_gone_reaches_the_worker_without_its_payload(c: Coordinator) -> None:
    c.start().welcome()
    c.expect(Ready)
    announced = msgspec.structs.replace(step(LARGE), blob=1)
    c.say(announced)
    c.say(task())
    pull, _ = c.expect(Pull)
    c.say(Chunk(blob=1, offset=pull.offset, gone=True))
    for _ in range(WINDOW - 1):
        c.expect(Pull)
    c.expect(Update)
    c.dismiss()
    assert c.workers[0].jobs[0] == (announced, None)


def test_a_large_update_stays_here_until_it_is_pulled(c: Coordinator) -> None:
    c.start(lambda message, data: update(task(), LARGE)).welcome()
    c.expect(Ready)
    c.say(task())
    said, buffer = c.expect(Update)
    assert buffer is None
    assert said.blob is not None
    inbox = Inbox[str](time.monotonic)
    pulls, arrived = inbox.open(b"", said.blob, LARGE, "update"), None
    while arrived is None:
        for pull in pulls:
            c.say(pull)
        pulls, arrived = inbox.take(b"", *c.expect(Chunk))
    assert arrived.data == data_of(LARGE)
    c.say(Pull(blob=said.blob, offset=0, nbytes=1))  # it has been read, and is gone
    assert c.expect(Chunk)[0].gone


def test_a_large_update_that_is_rejected_unread_is_let_go(c: Coordinator) -> None:
    c.start(lambda message, data: update(message, LARGE)).welcome()  # type: ignore[arg-type]
    c.expect(Ready)
    blobs = []
    for client in (0, 1):
        c.say(task(client))
        said, _ = c.expect(Update)
        assert said.blob is not None
        blobs.append(said.blob)
    c.say(Reject(round=1, attempt=0, client=0, reason="stale"))
    for blob, is_gone in zip(blobs, (True, False), strict=True):
        c.say(Pull(blob=blob, offset=0, nbytes=1))
        assert c.expect(Chunk)[0].gone == is_gone


def test_a_heartbeat_says_what_it_is_busy_with_while_it_works(c: Coordinator) -> None:
    block = Blocker()

    def answer(message: Message, data: Frame | None) -> Outcome:
        block()
        return update(task())

    c.start(answer).welcome(heartbeat_seconds=0.05, patience_seconds=60.0)
    c.expect(Ready)
    c.say(task())
    assert block.entered.wait(WITHIN_SECONDS)
    while not (beat := c.expect(Beat)[0]).busy.startswith("round"):
        assert beat == Beat()  # it is as the coordinator takes it to be
    assert beat.busy == "round 1, client 0"
    assert c.expect(Beat)[0] == Beat()  # nothing new
    block.go_on.set()
    said: set[str] = set()
    while not {"Update", "waiting"} <= said:  # in the one order or the other
        message, _ = c.hear()
        said.add(message.busy if isinstance(message, Beat) else type(message).__name__)
    assert said <= {"", "Update", "waiting"}
    c.dismiss()


def test_after_another_login_a_beat_says_anew_what_it_does(c: Coordinator) -> None:
    block = Blocker()

    def answer(message: Message, data: Frame | None) -> Outcome:
        block()
        return update(task())

    c.start(answer).welcome(heartbeat_seconds=0.05, patience_seconds=60.0)
    c.expect(Ready)
    c.say(task())
    while c.expect(Beat)[0].busy != "round 1, client 0":
        pass
    c.say(Refuse(code="login", reason="log in first"))  # as one that was started again says
    c.welcome(heartbeat_seconds=0.05, patience_seconds=60.0)
    c.expect(Ready)
    assert c.expect(Beat)[0].busy == "round 1, client 0"
    block.go_on.set()
    c.expect(Update)
    c.dismiss()


def test_garbage_and_rejections_are_survived(c: Coordinator) -> None:
    c.start().welcome()
    c.expect(Ready)
    ours = bytes([VERSION])
    for frames in ([ours], [ours, b"\xc1"], [b""] * 5):
        assert c.router.send(c.peer, frames)
    c.say(Chunk(blob=9, offset=0), b"x")
    c.say(Reject(round=1, attempt=0, client=0, reason="after the deadline"))
    c.say(task())
    c.expect(Update)
    c.dismiss()


# --- coming back -----------------------------------------------------------------


def test_told_to_log_in_it_does_and_repeats_that_it_is_ready(c: Coordinator) -> None:
    c.start().welcome()
    c.expect(Ready)
    c.say(step(), data_of(8))
    c.say(task())
    c.expect(Update)
    before = c.peer
    c.say(Refuse(code="login", reason="log in first"))
    c.welcome()
    assert c.peer == before
    assert c.expect(Ready)[0] == HELD
    assert len(c.workers) == 1
    c.dismiss()


def test_after_a_silence_it_comes_back_on_a_new_connection(c: Coordinator) -> None:
    c.start().welcome(**HASTY)
    c.expect(Ready)
    before = c.peer
    c.welcome()  # nothing was said to it meanwhile
    assert c.peer != before
    c.expect(Ready)
    c.say(task())
    c.expect(Update)
    c.dismiss()
    assert len(c.workers) == 1


def test_a_first_message_that_may_have_been_lost_is_sent_whole_again(c: Coordinator) -> None:
    """Else a run whose evaluator reconnects in its first second would never start."""
    c.start(first=FOUNDING).welcome(**HASTY)
    c.expect(Ready)  # which the coordinator never saw
    c.welcome()
    ready, buffer = c.expect(Ready)
    assert (msgspec.structs.replace(ready, vitals=None), buffer) == (FOUNDING.message, bytes(8))
    c.say(Evaluate(version=0))
    c.say(Refuse(code="login", reason="log in first"))
    c.welcome()


@pytest.mark.parametrize("is_told", [False, True])
def test_what_waited_for_a_lost_payload_is_forgotten(c: Coordinator, is_told: bool) -> None:
    c.start().welcome(**({} if is_told else HASTY))
    c.expect(Ready)
    c.say(msgspec.structs.replace(step(LARGE), blob=1))
    c.say(task(0))
    for _ in range(WINDOW):
        c.expect(Pull)
    if is_told:
        c.say(Refuse(code="login", reason="log in first"))
    c.welcome()
    c.expect(Ready)
    c.say(task(1))
    assert c.expect(Update)[0].client == 1
    c.dismiss()
    assert [job for job, _ in c.workers[0].jobs] == [task(1)]


def test_another_run_gets_a_worker_of_its_own(c: Coordinator) -> None:
    c.start().welcome("run-1")
    c.expect(Ready)
    c.say(Refuse(code="login", reason="log in first"))
    c.welcome("run-2")
    c.expect(Ready)
    c.say(task())
    c.expect(Update)
    c.dismiss()
    assert [len(worker.jobs) for worker in c.workers] == [0, 1]


def test_a_goodbye_that_is_not_final_is_followed_by_a_login(c: Coordinator) -> None:
    c.start().welcome()
    c.expect(Ready)
    c.say(Bye(reason="restarting"))
    c.welcome()
    c.expect(Ready)
    c.dismiss()


# --- ends ------------------------------------------------------------------------


def test_a_final_goodbye_ends_it_without_another_word(c: Coordinator) -> None:
    c.start().welcome()
    c.expect(Ready)
    c.dismiss()
    while (said := c.router.recv(0.0)) is not None:  # what had left before the goodbye came
        assert isinstance(to_coordinator.unpack(said[1])[0], Beat)


@pytest.mark.parametrize("code", ["version", "clients", "superseded", "of a later version"])
def test_a_refusal_ends_it_with_the_reason(c: Coordinator, code: str) -> None:
    c.start().expect(Hello)
    c.say(Refuse(code=code, reason="client 1 is already hosted by node b"))
    with pytest.raises(RefusedError, match="hosted by node b"):
        c.ended()


def test_a_refusal_by_another_protocol_version_is_read(c: Coordinator) -> None:
    c.start().expect(Hello)
    _, *frames = to_node.pack(Refuse(code="version", reason="install seedwire 9"))
    assert c.router.send(c.peer, [b"\x09", *frames])
    with pytest.raises(RefusedError, match="install seedwire 9"):
        c.ended()


def test_anything_else_of_another_protocol_version_is_a_refusal_too(c: Coordinator) -> None:
    c.start().expect(Hello)
    assert c.router.send(c.peer, [b"\x09", b"\x80"])
    with pytest.raises(RefusedError, match=r"protocol 9.*install the same seedwire"):
        c.ended()


def test_an_error_in_loading_ends_it_and_says_goodbye(c: Coordinator) -> None:
    c.start(make=refusing(ModelError("no such model"))).welcome()
    assert c.expect(Bye)[0].reason == "the test is over"
    with pytest.raises(ModelError, match="no such model"):
        c.ended()


def test_it_gives_up_when_told_to(c: Coordinator) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and does not listen
        endpoint = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        c.start(endpoint=endpoint, give_up_seconds=0.1)
        with pytest.raises(NetworkError, match=f"no coordinator at {endpoint}"):
            c.ended()


def test_it_looks_again_and_again(c: Coordinator) -> None:
    """The coordinator may well be started last: a login that nobody answers is repeated."""
    c.start()
    peers = set()
    for _ in range(3):
        c.expect(Hello)
        peers.add(c.peer)
    assert len(peers) == 3
    c.say(Welcome(run="run-1", experiment=TABLE))
    while not isinstance(c.hear()[0], Ready):
        pass
    c.dismiss()


def test_leaving_in_the_middle_of_a_job_is_told(c: Coordinator) -> None:
    block = Blocker()

    def answer(message: Message, data: Frame | None) -> None:
        block()

    c.start(answer).welcome()
    c.expect(Ready)
    c.say(task())
    assert block.entered.wait(WITHIN_SECONDS)
    c.say(Bye(finished=True))
    try:
        assert c.ended() is False
    finally:
        block.go_on.set()


def test_a_closed_connection_is_noticed_without_waiting_for_a_silence(c: Coordinator) -> None:
    """With patience for an hour: only the close itself can have told."""
    c.start().welcome(heartbeat_seconds=1000.0, patience_seconds=3600.0)
    c.expect(Ready)
    endpoint = c.router.endpoint
    c.router.close()
    c.router = Router(endpoint)
    assert isinstance(c.hear()[0], Hello)
    c.say(Welcome(run="run-1", experiment=TABLE))
    assert c.expect(Ready)[0] == FIRST.message
    c.dismiss()


def test_the_coordinator_learns_of_a_closed_connection_and_whose_it_was() -> None:
    router = Router("tcp://127.0.0.1:*")
    dealers = [Dealer(router.endpoint) for _ in range(2)]
    try:
        peers = []
        for dealer in dealers:
            assert dealer.send(to_coordinator.pack(Beat()))
            got = router.recv(WITHIN_SECONDS)
            assert got is not None
            peers.append(got[0])
        assert not router.lost_one()
        dealers[0].reconnect()
        assert router.recv(WITHIN_SECONDS) is None  # woken: nobody has said anything
        assert router.lost_one()
        assert not router.lost_one()
        while router.send(peers[0], to_node.pack(Beat())):
            router.recv(0.01)  # the socket settles in a moment
        assert router.send(peers[1], to_node.pack(Beat()))
    finally:
        for dealer in dealers:
            dealer.close()
        router.close()
