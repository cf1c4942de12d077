"""Sockets with keys: who gets in, who is turned away, and what each side is told."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import zmq

from protocol import router as routers
from protocol.dealer import Dealer
from protocol.errors import KeyRefusedError, NetworkError, RefusedError
from protocol.keys import Identity, KeyPair
from protocol.router import Router
from protocol.wire import Peer

pytestmark = pytest.mark.net

WITHIN_SECONDS = 20.0
SERVER, NODE, OTHER = KeyPair.new(), KeyPair.new(), KeyPair.new()
GREETING = bytes.fromhex("ff00000000000000017f0300") + b"NULL".ljust(52, b"\0")


@dataclass
class Doorkeeper:
    """Admits whoever is on its list."""

    secret: bytes | None = SERVER.secret
    admitted: set[str] = field(default_factory=lambda: {NODE.public})
    asked: list[tuple[str, str]] = field(default_factory=list)
    away: Counter[str] = field(default_factory=Counter)

    def admits(self, key: str, address: str) -> bool:
        self.asked.append((key, address))
        return key in self.admitted

    def turned_away(self, reason: str) -> None:
        self.away[reason] += 1


class Ends:
    """A router and dealers, closed after the test."""

    def __init__(self) -> None:
        self.closing: list[Callable[[], None]] = []

    def router(self, doorkeeper: Doorkeeper | None) -> Router:
        router = Router("tcp://127.0.0.1:*", doorkeeper)
        self.closing.append(router.close)
        return router

    def dealer(self, router: Router, identity: Identity | None) -> Dealer:
        dealer = Dealer(router.endpoint, identity)
        self.closing.insert(0, dealer.close)
        return dealer


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    for close in ends.closing:
        close()


def until(router: Router, done: Callable[[], bool]) -> None:
    """Let the router see what happens to it; no message may arrive meanwhile."""
    for _ in range(round(WITHIN_SECONDS / 0.05)):
        if done():
            return
        assert router.recv(0.05) is None
    pytest.fail("it never happened")


def _listen(dealer: Dealer) -> None:
    """Wait for a verdict; the other side may hang up a few times before it is understood."""
    for _ in range(50):
        assert dealer.recv(WITHIN_SECONDS / 50) in (None, [b""])  # empty: just before a cut


def test_a_message_comes_with_the_key_that_its_sender_proved(ends: Ends) -> None:
    router = ends.router(door := Doorkeeper(admitted={NODE.public, OTHER.public}))
    peers = []
    for pair in (NODE, OTHER):
        dealer = ends.dealer(router, Identity(pair, SERVER.public))
        assert dealer.send([b"hello", b"body"])
        got = router.recv(WITHIN_SECONDS)
        assert got is not None
        assert got[1] == [b"hello", b"body"]
        peers.append(got[0])
        assert router.send(got[0], [b"back"])
        assert dealer.recv(WITHIN_SECONDS) == [b"back"]
    assert [peer.key for peer in peers] == [NODE.public, OTHER.public]
    assert door.asked == [(NODE.public, "127.0.0.1"), (OTHER.public, "127.0.0.1")]
    assert len({peer.fd for peer in peers}) == 2
    assert door.away == {}


def test_without_keys_there_is_none_and_the_connection_is_known(ends: Ends) -> None:
    router = ends.router(None)
    ends.dealer(router, None).send([b"hello"])
    got = router.recv(WITHIN_SECONDS)
    assert got is not None
    assert got[0].key == ""
    with socket.socket(fileno=got[0].fd) as connection:
        port = int(router.endpoint.rpartition(":")[2])
        assert connection.getsockname() == ("127.0.0.1", port)
        connection.detach()


def test_a_key_that_is_not_admitted_is_told_so_and_nothing_of_it_arrives(ends: Ends) -> None:
    router = ends.router(door := Doorkeeper())
    dealer = ends.dealer(router, Identity(OTHER, SERVER.public))
    dealer.send([b"hello"])
    with pytest.raises(KeyRefusedError, match=f"does not admit key {OTHER.public[:16]}"):
        dealer.recv(WITHIN_SECONDS)
    assert door.asked == [(OTHER.public, "127.0.0.1")]
    assert router.recv(0.1) is None


def test_who_pins_another_coordinators_key_is_warned_in_one_line(
    ends: Ends, caplog: pytest.LogCaptureFixture
) -> None:
    router = ends.router(door := Doorkeeper())
    dealer = ends.dealer(router, Identity(NODE, OTHER.public))
    dealer.send([b"hello"])
    with caplog.at_level(logging.WARNING):
        for _ in range(200):
            assert dealer.recv(0.05) is None
            assert router.recv(0.0) is None
            if caplog.records:
                break
    assert [record.getMessage() for record in caplog.records] == [
        f"{router.endpoint} ends each handshake: it is no coordinator, or not the one whose key "
        f"{OTHER.public[:16]} this node trusts"
    ]
    until(router, lambda: door.away["another coordinator's key"] >= 3)
    assert door.asked == []


@pytest.mark.parametrize(
    ("secret", "identity", "told", "counted"),
    [
        (SERVER.secret, None, "wants a key, and this node was started with --insecure", "no key"),
        (
            None,
            Identity(NODE, SERVER.public),
            "was started with --insecure, and this node was not",
            "a key, with --insecure here",
        ),
    ],
    ids=["only the coordinator", "only the node"],
)
def test_keys_on_one_side_only_is_said_on_both(
    ends: Ends, secret: bytes | None, identity: Identity | None, told: str, counted: str
) -> None:
    router = ends.router(door := Doorkeeper(secret))
    dealer = ends.dealer(router, identity)
    dealer.send([b"hello"])
    with pytest.raises(RefusedError, match=told) as raised:
        _listen(dealer)
    assert not isinstance(raised.value, KeyRefusedError)
    until(router, lambda: sum(door.away.values()) >= 1)
    assert set(door.away) <= {counted, "broken handshake"}  # who hangs up first is open


def test_a_stranger_that_hangs_up_in_the_middle_is_counted(ends: Ends) -> None:
    router = ends.router(door := Doorkeeper())
    with socket.create_connection(("127.0.0.1", int(router.endpoint.rpartition(":")[2]))) as wire:
        wire.sendall(GREETING[:30])
        wire.shutdown(socket.SHUT_WR)
        until(router, lambda: door.away["broken handshake"] == 1)


def test_what_is_no_zmtp_is_hung_up_on(ends: Ends) -> None:
    router = ends.router(door := Doorkeeper())
    with socket.create_connection(("127.0.0.1", int(router.endpoint.rpartition(":")[2]))) as wire:
        wire.settimeout(WITHIN_SECONDS)
        wire.sendall(b"GET / HTTP/1.0\r\n\r\n" + bytes(64))
        with contextlib.suppress(ConnectionResetError):
            while wire.recv(4096):
                pass
    assert router.recv(0.1) is None
    assert door.asked == []


def test_a_doorkeeper_that_fails_lets_nobody_in_and_is_asked_again(ends: Ends) -> None:
    door = Doorkeeper()
    asked = []

    def fails_once(key: str, address: str) -> bool:
        asked.append(key)
        if len(asked) == 1:
            raise OSError("the list cannot be read")
        return True

    door.admits = fails_once  # type: ignore[method-assign]
    router = ends.router(door)
    dealer = ends.dealer(router, Identity(NODE, SERVER.public))
    dealer.send([b"hello"])
    for _ in range(200):
        assert dealer.recv(0.05) is None  # no verdict on the key: not refused
        if asked:
            break
    assert router.recv(0.1) is None
    dealer.reconnect()
    dealer.send([b"again"])
    got = router.recv(WITHIN_SECONDS)
    assert got is not None
    assert got[1] == [b"again"]


def test_cutting_closes_the_connection_and_no_other(ends: Ends) -> None:
    router = ends.router(door := Doorkeeper(admitted={NODE.public, OTHER.public}))
    found: list[Peer] = []
    dealers = [ends.dealer(router, Identity(pair, SERVER.public)) for pair in (NODE, OTHER)]
    for dealer in dealers:
        dealer.send([b"hello"])
        got = router.recv(WITHIN_SECONDS)
        assert got is not None
        found.append(got[0])
    door.admitted.remove(NODE.public)
    router.cut(found[0])
    with pytest.raises(KeyRefusedError):  # it came back, which it could only once it was cut
        _listen(dealers[0])
    dealers[1].send([b"still here"])
    assert router.recv(WITHIN_SECONDS) == (found[1], [b"still here"])
    router.cut(found[0])  # its number may be another's by now
    dealers[1].send([b"and here"])
    assert router.recv(WITHIN_SECONDS) == (found[1], [b"and here"])


def test_what_crosses_the_wire_is_not_readable(ends: Ends) -> None:
    """A relay between the two sees every byte."""
    text = b"the quick brown fox"
    seen = {}
    for identity, door in ((None, None), (Identity(NODE, SERVER.public), Doorkeeper())):
        router = ends.router(door)
        with socket.create_server(("127.0.0.1", 0)) as relay:
            dealer = Dealer(f"tcp://127.0.0.1:{relay.getsockname()[1]}", identity)
            ends.closing.insert(0, dealer.close)
            dealer.send([text])
            inward, _ = relay.accept()
            port = int(router.endpoint.rpartition(":")[2])
            with inward, socket.create_connection(("127.0.0.1", port)) as outward:
                seen[identity is None] = _relay(inward, outward, router)
    assert text in seen[True]
    assert text not in seen[False]


def _relay(inward: socket.socket, outward: socket.socket, router: Router) -> bytes:
    """Pass bytes on until the router has a message; returns those towards it."""
    up = b""
    for end in (inward, outward):
        end.setblocking(False)
    for _ in range(2000):
        for source, target in ((inward, outward), (outward, inward)):
            try:
                data = source.recv(1 << 16)
            except BlockingIOError:
                continue
            target.sendall(data)
            up += data if source is inward else b""
        if router.recv(0.01) is not None:
            return up
    pytest.fail("no message came through")


def test_a_port_that_is_taken_leaves_nothing_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(NetworkError, match="port in use"):
            Router(endpoint, Doorkeeper())


def _cut(router: Router, peer: Peer) -> None:
    router.cut(peer)


def _watch(router: Router, peer: Peer) -> None:
    router.watch(peer, "old")
    assert not router.send(peer, [b"welcome"])
    assert [growth.owner for growth in router.grown()] == []


def _dealer(context: zmq.Context[zmq.Socket[bytes]], router: Router) -> zmq.Socket[bytes]:
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 1000)
    dealer.setsockopt(zmq.RECONNECT_IVL, -1)  # once it is cut, that is the end
    monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    dealer.connect(router.endpoint)
    assert monitor.poll(5000), "no handshake"
    dealer.disable_monitor()
    monitor.close()
    return dealer


@pytest.mark.parametrize("act", [_cut, _watch])
def test_who_is_gone_and_is_read_only_now_is_not_taken_for_who_has_its_number(
    act: Callable[[Router, Peer], None],
) -> None:
    router = Router("tcp://127.0.0.1:*")
    context = zmq.Context()

    def said(text: bytes) -> zmq.Socket[bytes]:
        dealer = _dealer(context, router)
        dealer.send(text)
        return dealer

    def close(dealer: zmq.Socket[bytes]) -> None:
        num_closed.clear()
        dealer.close()
        while not num_closed:
            assert router._monitor.socket.poll(5000)
            router._take_events()

    take, num_closed = router._monitor.take, list[int]()

    def noted() -> Iterator[tuple[int, int]]:
        for event, value in take():
            num_closed.extend([value] * (event == zmq.EVENT_DISCONNECTED))
            yield event, value

    router._monitor.take = noted  # type: ignore[method-assign]
    try:
        num_acted = 0
        for _ in range(20):  # the kernel gives the lowest free number, so nearly always
            close(said(b"old"))
            dealer = said(b"new")
            found = [_next(router)]
            if found[0][1] == [b"old"]:
                act(router, found[0][0])
                num_acted += 1
            found.append(_next(router))
            ((old, _),) = [f for f in found if f[1] == [b"old"]]
            ((new, _),) = [f for f in found if f[1] == [b"new"]]
            assert router.send(new, [b"still there?"])
            assert dealer.poll(5000), "another connection was cut"
            assert dealer.recv() == b"still there?"
            num_acted -= old.fd != new.fd
            close(dealer)
            router.lost_one()
        assert num_acted > 0
    finally:
        context.destroy(linger=0)
        router.close()


def test_of_many_who_never_log_in_the_oldest_are_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routers, "MAX_STRANGERS", 3)
    router = Router("tcp://127.0.0.1:*")
    context = zmq.Context()
    try:
        dealers, peers = [], []
        for i in range(6):
            dealers.append(_dealer(context, router))
            dealers[-1].send(b"hello")
            peers.append(_next(router)[0])
            if i == 0:
                router.watch(peers[0], "node")
                assert router.send(peers[0], [b"welcome"])
            router.lost_one()
        for peer, is_open in zip(peers, [True, False, False, True, True, True], strict=True):
            for _ in range(500):
                if is_open or not router.send(peer, [b"?"]):
                    break
                router.recv(0.01)
            else:
                pytest.fail("it was not closed")
            assert router.send(peer, [b"!"]) is is_open
        dealers[0].send(b"still here")
        assert _next(router) == (peers[0], [b"still here"])
    finally:
        context.destroy(linger=0)
        router.close()


def test_a_new_connection_is_read_whatever_became_of_its_number_before(ends: Ends) -> None:
    router = ends.router(None)
    router._shut.update(range(1000))  # as if libzmq had told of none of their ends
    ends.dealer(router, None).send([b"hello"])
    found = (router.recv(0.2) for _ in range(100))
    assert next(got[1] for got in found if got is not None) == [b"hello"]


def _next(router: Router) -> tuple[Peer, list[bytes]]:
    for _ in range(100):
        if (got := router.recv(5.0)) is not None:
            return got
        assert router.lost_one(), "nothing came"
    pytest.fail("nothing came")


def test_a_signal_between_two_frames_spoils_its_own_message_only(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = ends.router(None)
    dealer = ends.dealer(router, None)
    assert dealer.send([b"\x04", b"body"])
    got = router.recv(WITHIN_SECONDS)
    assert got is not None
    whole = zmq.Socket.send_multipart

    def interrupted(self: zmq.Socket[bytes], frames: list[bytes], *_: object, **__: object) -> None:
        for frame in frames[:-1]:
            self.send(frame, zmq.SNDMORE)
        raise KeyboardInterrupt

    monkeypatch.setattr(zmq.Socket, "send_multipart", interrupted)
    with pytest.raises(KeyboardInterrupt):
        router.send(got[0], [b"\x04", b"cut short"])
    monkeypatch.setattr(zmq.Socket, "send_multipart", whole)
    assert router.send(got[0], [b"\x04", b"goodbye"])
    assert dealer.recv(WITHIN_SECONDS) == [b"\x04", b""]
    assert dealer.recv(WITHIN_SECONDS) == [b"\x04", b"goodbye"]
