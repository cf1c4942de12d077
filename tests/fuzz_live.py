"""Hostile messages over real sockets, to a live coordinator and a live node, in processes.

    python -m tests.fuzz_live --count 100000 [--curve]

Half of them go to a coordinator, by connections that never log in and by nodes that do and
then misbehave, while two good nodes and an evaluator work beside them, round after round.
The other half go to a node, by a coordinator gone mad; afterwards the node has to do a task.
What is sent are messages that Hypothesis made, and frames of real talk, whole or damaged.
With ``--curve`` whoever fires at the coordinator has an enrolled key: others are not read.
Every case follows from ``--seed`` and its number.  The last line says how many were sent and
how much memory that cost; the exit status is 0 only if both processes lived, the rounds went
on, and neither grew by more than 20 MB.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import zmq
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from rich.console import Console

from coordinator import enrolled as book
from coordinator import run as coordinator
from coordinator.place import Place
from fedalgos.space import ParamSpace
from node.engine import Engine, Outcome, Setup
from node.session import Session
from protocol import experiment as experiments
from protocol import payload
from protocol.channel import to_coordinator, to_node
from protocol.errors import SeedwireError
from protocol.keys import Identity, KeyPair
from protocol.messages import (
    Beat,
    Bye,
    Chunk,
    Evaluate,
    Failed,
    Hello,
    Message,
    Pull,
    Ready,
    Refuse,
    Score,
    Step,
    Sync,
    Task,
    Update,
    Welcome,
)
from protocol.noise import STREAM
from protocol.parts import TensorInfo
from protocol.router import Router
from protocol.wire import Frame
from tests.fakes import ScriptedWorker
from tests.fuzz_payload import damaged
from tests.test_messages import MESSAGES

MOST_GROWTH = 20_000_000  # bytes
PER_STRANGER, PER_NODE = 10, 30  # messages by one connection: few enough that all are read
NUM_EVIL = 40  # clients that hostile nodes host
NUM_KEYS = 400  # of hostile nodes; one key may not log in all the time
WARM_UP_ROUNDS = 20
PACE_SECONDS = 0.01  # of a good node's task, so that rounds do not fill the disk
SPACE = ParamSpace.of([TensorInfo("t", (64,), "u")])
X = np.zeros(SPACE.size, np.float32)
HELD = Ready(version=0, digest=bytes(16), space=SPACE.digest)
FOUNDING = msgspec.structs.replace(
    HELD, tensors=SPACE.tensors, payload=payload.spec_of(payload.Dense(X))
)
TABLE: dict[str, Any] = {
    "run": {"name": "fuzz"},
    "model": {"id": "random:x"},
    "data": {"id": "x.csv"},
    "method": {"name": "fedavg", "steps": 1},
    "partition": {"clients": 2 + NUM_EVIL},
    "nodes": {"start_clients": 2},
    "rounds": {"count": 1_000_000, "target": 2, "quorum": 1, "evaluate_every": 1000},
}
TABLE["rounds"] |= {"deadline_seconds": 2.0}
Frames = Sequence[Frame]
Rng = np.random.Generator
Identities = Mapping[str, Identity]  # by name; empty without keys

# --- what is sent ----------------------------------------------------------------


def generated(kinds: Sequence[type[Message]], count: int, seed: int) -> list[Frames]:
    """Messages that Hypothesis makes, packed; also such as the other direction has."""
    made: list[Frames] = []
    channel: Any = to_node if Task in kinds else to_coordinator

    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of([MESSAGES[kind] for kind in kinds]), st.binary(max_size=64))
    def make(message: Any, data: bytes) -> None:
        buffer = None
        if isinstance(message, Chunk) and not message.gone:
            buffer = data
        elif getattr(message, "payload", None) is not None and message.blob is None:
            if message.payload.nbytes > 1 << 16:
                return
            buffer = bytes(message.payload.nbytes)
        made.append(channel.pack(message, buffer))

    seeded(seed)(make)()
    return made


def recorded() -> list[Frames]:
    """What a node really says in a round, and what it might say at the wrong time."""
    value = payload.Dense(X)
    place: dict[str, Any] = {"round": 1, "attempt": 0, "client": 2}
    update = Update(**place, examples=3, loss=0.5, payload=payload.spec_of(value))
    announced = msgspec.structs.replace(update, payload=payload.DenseSpec(1 << 18), blob=1)
    return [
        to_coordinator.pack(HELD),
        to_coordinator.pack(FOUNDING, payload.encode(value)),
        to_coordinator.pack(update, payload.encode(value)),
        to_coordinator.pack(announced),
        to_coordinator.pack(Chunk(blob=1, offset=0), bytes(1 << 19)),
        to_coordinator.pack(Pull(blob=1, offset=0, nbytes=1 << 20)),
        to_coordinator.pack(Failed(**place, reason="x" * 2000)),
        to_coordinator.pack(Sync(version=0, reason="never content")),
        to_coordinator.pack(Score(version=1, loss=0.0, metric=1.0, examples=1)),
        to_coordinator.pack(Beat(busy="x" * 2000)),
        to_coordinator.pack(Bye(reason="for now")),
    ]


def orders() -> list[Frames]:
    """What a coordinator says to a node, and what none would."""
    value = payload.Dense(X)
    step = Step(version=1, round=1, digest=bytes(16), payload=payload.spec_of(value))
    large = msgspec.structs.replace(step, payload=payload.DenseSpec(1 << 38), blob=7)
    return [
        to_node.pack(step, payload.encode(value)),
        to_node.pack(msgspec.structs.replace(step, snapshot=True), payload.encode(value)),
        to_node.pack(large),
        to_node.pack(Chunk(blob=7, offset=0), bytes(1 << 19)),
        to_node.pack(Task(round=1, attempt=0, client=0, version=0)),
        to_node.pack(Evaluate(version=0)),
        to_node.pack(Pull(blob=1, offset=0, nbytes=1 << 20)),
        to_node.pack(Welcome(run="another", experiment={"run": {"name": "x"}})),
        to_node.pack(Welcome(run="fuzz", experiment=TABLE)),
    ]


def case(rng: Rng, pool: Sequence[Frames], real: Sequence[Frames]) -> list[bytes]:
    """One hostile message: as it was made, damaged, or with frames of another."""
    of = real if rng.random() < 0.5 else pool
    frames = [bytes(frame) for frame in of[int(rng.integers(len(of)))]]
    match rng.integers(8):
        case 0 | 1:
            pass
        case 2:
            frames[rng.integers(len(frames))] = rng.bytes(int(rng.integers(200)))
        case 3:
            frames.append(rng.bytes(int(rng.integers(20))))
        case 4:
            del frames[rng.integers(len(frames))]
        case _:  # the body, most of the time: the version is a byte
            at = min(1, len(frames) - 1) if rng.random() < 0.9 else int(rng.integers(len(frames)))
            frames[at] = damaged(rng, frames[at])
    return frames or [b""]


# --- the two under fire, each in a process of its own ----------------------------


def serve(directory: Path, has_keys: bool) -> None:
    """A coordinator without an evaluation worker; ends when its standard input does."""
    experiment = experiments.convert(TABLE, "fuzz")
    keys = directory / "keys" if has_keys else None
    place = Place("tcp://127.0.0.1:*", directory, starts_evaluator=False, keys=keys)
    threading.Thread(target=_end_with_input, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):  # it says goodbye to its nodes
        coordinator.run(experiment, place, Console(quiet=True))


def attend(endpoint: str) -> None:
    """A node that logs in again whatever it is told; ends when its standard input does."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    logging.disable()
    while True:
        session = good_node(endpoint, "node", (0, 1))
        try:
            session.run()
        except SeedwireError:
            pass  # an orderly end: it was refused, or sent nonsense for an experiment
        finally:
            session.leave("again")


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """This module in another mode, ended at the end; its last words are on our standard error."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz_live", *arguments], stdin=subprocess.PIPE
    )
    try:
        yield child
    finally:
        assert child.stdin is not None
        child.stdin.close()
        child.wait(20)


def enrolled(directory: Path, names: Sequence[str]) -> Identities:
    """Keys for all of these, which the coordinator of this directory admits."""
    own = book.own_pair(directory / "keys").public
    found = {name: Identity(KeyPair.new(), own) for name in names}

    def add(listed: book.Enrolled) -> book.Enrolled:
        for name, identity in found.items():
            listed = listed.enroll(name, identity.own.public)
        return listed

    book.change(directory / "keys", add)
    return found


def good_node(
    endpoint: str,
    name: str,
    clients: tuple[int, ...],
    pace: float = 0.0,
    identity: Identity | None = None,
) -> Session:
    """A real session with a scripted worker; without clients the evaluator."""

    def answer(message: Message, data: Frame | None) -> Outcome | None:
        del data
        match message:
            case Task(round=number, attempt=attempt, client=client):
                time.sleep(pace)  # stands for training
                value = payload.Dense(X)
                update = Update(
                    round=number,
                    attempt=attempt,
                    client=client,
                    examples=1,
                    loss=0.5,
                    payload=payload.spec_of(value),
                )
                return Outcome(update, payload.encode(value))
            case Evaluate(version=version):
                return Outcome(Score(version=version, loss=1.0, metric=0.5, examples=1))
            case _:
                return None

    first = Outcome(HELD) if clients else Outcome(FOUNDING, payload.encode(payload.Dense(X)))

    def engine(experiment: Any, setup: Setup, wake: Callable[[], None]) -> Engine:
        make: Any = lambda *_: ScriptedWorker(answer, first, HELD)  # noqa: E731
        return Engine(experiment, setup, wake, make)

    setup = Setup(clients, evaluates=not clients)
    software = metadata.version("seedwire")
    return Session(endpoint, name, software, setup, make_engine=engine, identity=identity)


# --- fire ------------------------------------------------------------------------


class Watch:
    """A child's memory over what it had, and whether it lives."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child, self._process = child, psutil.Process(child.pid)
        self._before = self._process.memory_info().rss
        self.growth = 0

    def look(self) -> None:
        assert self._child.poll() is None, f"it ended with {self._child.returncode}"
        self.growth = max(self.growth, self._process.memory_info().rss - self._before)


def at_coordinator(count: int, seed: int, has_keys: bool = False) -> tuple[int, int]:
    """Fire at a coordinator.

    Returns:
        How many bytes it grew by, and how many rounds were committed meanwhile.
    """
    kinds: list[type[Message]] = [Hello, Ready, Update, Failed, Score, Sync, Beat, Pull, Chunk, Bye]
    pool, real = generated(kinds, 300, seed), recorded()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        good = {"good-0": (0,), "good-1": (1,), "scorer": ()}
        names = [*good, *(f"evil-{i}" for i in range(NUM_KEYS))]
        identities = enrolled(directory, names) if has_keys else {}
        with process("--serve", name, *(["--curve"] if has_keys else [])) as child:
            endpoint = _announced(directory, child)
            threads = []
            for who, clients in good.items():
                session = good_node(endpoint, who, clients, PACE_SECONDS, identities.get(who))
                threads.append(threading.Thread(target=_quietly(session), daemon=True))
                threads[-1].start()
            _until(lambda: _rounds(directory) >= WARM_UP_ROUNDS, child)
            watch, before = Watch(child), _rounds(directory)
            context = zmq.Context()
            numbers = iter(range(count))
            for i in itertools.count():
                some = list(itertools.islice(numbers, PER_NODE if i % 3 else PER_STRANGER))
                if not some:
                    break
                cases = [case(np.random.default_rng([seed, n]), pool, real) for n in some]
                _attack(context, endpoint, cases, i, identities)
                watch.look()
            done = _rounds(directory) - before
            _until(lambda: _rounds(directory) >= before + done + 5, child)  # and after it all
            context.term()  # when all was sent
            watch.look()
            child.send_signal(signal.SIGINT)
            for thread in threads:
                thread.join(20)
                assert not thread.is_alive(), "a good node did not hear the end"
            said = (directory / "logs" / "coordinator.log").read_text()
            assert "dropped a message of" in said  # or nothing of it was hostile
            return watch.growth, done


def _attack(
    context: zmq.Context[Any],
    endpoint: str,
    cases: list[list[bytes]],
    i: int,
    identities: Identities,
) -> None:
    """By one connection; two of three log in first."""
    name = f"evil-{i % NUM_KEYS if identities else i}"
    socket = context.socket(zmq.DEALER)
    if identities:
        own, known = identities[name].own, identities[name].coordinator
        socket.setsockopt(zmq.CURVE_PUBLICKEY, bytes.fromhex(own.public))
        socket.setsockopt(zmq.CURVE_SECRETKEY, own.secret)
        socket.setsockopt(zmq.CURVE_SERVERKEY, bytes.fromhex(known))
    socket.setsockopt(zmq.LINGER, 5000)
    socket.setsockopt(zmq.SNDTIMEO, 5000)
    socket.connect(endpoint)
    if i % 3:
        software = metadata.version("seedwire")
        hello = Hello(node=name, software=software, stream=STREAM, clients=(2 + i % NUM_EVIL,))
        socket.send_multipart(to_coordinator.pack(hello))
        assert socket.poll(20_000), "a login was not answered"
        socket.recv_multipart()
    for frames in cases:
        try:
            socket.send_multipart(frames)
        except zmq.Again:
            break  # it was cut off, and not let in again yet
    socket.close()


def at_node(count: int, seed: int) -> int:
    """Fire at a node, as its coordinator; returns how many bytes it grew by."""
    kinds: list[type[Message]] = [Task, Step, Evaluate, Beat, Pull, Chunk, Bye, Welcome]
    pool, real = generated(kinds, 300, seed), orders()
    router = Router("tcp://127.0.0.1:*")
    try:
        with process("--attend", router.endpoint) as child:
            peer = _welcomed(router, child)
            for n in range(200):  # warm
                router.send(peer, case(np.random.default_rng([seed, 1 << 40, n]), pool, real))
            watch = Watch(child)
            for n in range(count):
                router.send(peer, case(np.random.default_rng([seed, n]), pool, real))
                if n % 500 == 0:  # the same pace as the node's, or the queue here grows
                    peer = _settled(router, peer, child)
                    watch.look()
            peer = _welcomed(router, child)
            order = Task(round=1 << 30, attempt=0, client=0, version=0)
            router.send(peer, to_node.pack(order))
            _until(lambda: _answers(router, order), child)
            watch.look()
            return watch.growth
    finally:
        router.close()


def _heard(router: Router, within_seconds: float) -> tuple[Any, Any] | None:
    """Who says what next; whoever says hello is let in."""
    got = router.recv(within_seconds)
    if got is None:
        return None
    peer, frames = got
    message, _ = to_coordinator.unpack(frames)
    if isinstance(message, Hello):
        router.send(peer, to_node.pack(Welcome(run="fuzz", experiment=TABLE)))
    return peer, message


def _welcomed(router: Router, child: subprocess.Popen[bytes]) -> Any:
    """Let a node in: the one that says hello next, made to by refusing what it has."""
    refused: set[Any] = set()
    while True:
        assert child.poll() is None, f"the node ended with {child.returncode}"
        got = _heard(router, 1.0)
        if got is None:
            continue
        peer, message = got
        if isinstance(message, Hello):
            return peer
        if peer not in refused:
            refused.add(peer)
            router.send(peer, to_node.pack(Refuse(code="login", reason="again")))


def _settled(router: Router, peer: Any, child: subprocess.Popen[bytes]) -> Any:
    """Read what the node says until it has answered all so far; let it in again if it left."""
    mark = Task(
        round=(1 << 30) - 1, attempt=int(time.monotonic() * 1000) % (1 << 30), client=1, version=0
    )
    router.send(peer, to_node.pack(mark))
    end = time.monotonic() + 0.5  # a node whose jobs wait for a step answers nothing
    while time.monotonic() < end:
        assert child.poll() is None, f"the node ended with {child.returncode}"
        got = _heard(router, 0.05)
        if got is None:
            continue
        peer, message = got
        if isinstance(message, Update | Failed) and message.attempt == mark.attempt:
            break
    return peer


def _answers(router: Router, order: Task) -> bool:
    got = _heard(router, 0.5)
    if got is None:
        return False
    peer, message = got
    if isinstance(message, Hello):
        router.send(peer, to_node.pack(order))
    return isinstance(message, Update) and message.round == order.round


# --- helpers ---------------------------------------------------------------------


def _announced(directory: Path, child: subprocess.Popen[bytes]) -> str:
    path = directory / "coordinator.json"
    _until(path.exists, child)
    return str(msgspec.json.decode(path.read_bytes())["endpoint"])


def _rounds(directory: Path) -> int:
    """How many rounds were committed."""
    path = directory / "metrics.jsonl"
    return path.read_bytes().count(b'"train_loss"') if path.exists() else 0


def _until(done: Callable[[], bool], child: subprocess.Popen[bytes], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert child.poll() is None, f"it ended with {child.returncode}"
        assert time.monotonic() < end, "it does not go on"
        time.sleep(0.05)


def _quietly(session: Session) -> Callable[[], None]:
    def ran() -> None:
        session.run()
        session.leave("the run is over")

    return ran


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--curve", action="store_true", help="with keys at the coordinator")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--attend", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.serve is not None:
        return serve(o.serve, o.curve)
    if o.attend is not None:
        return attend(o.attend)
    logging.disable()
    half = o.count // 2
    grown, done = at_coordinator(o.count - half, o.seed, o.curve)
    sys.stdout.write(f"coordinator: {o.count - half} sent, {done} rounds meanwhile\n")
    node = at_node(half, o.seed)
    sys.stdout.write(f"node: {half} sent, it still does its tasks\n")
    sys.stdout.write(
        f"{o.count} hostile messages; the coordinator grew by {grown / 1e6:.1f} MB, "
        f"the node by {node / 1e6:.1f} MB\n"
    )
    sys.exit(0 if done > 0 and max(grown, node) <= MOST_GROWTH else 1)


if __name__ == "__main__":
    main()
