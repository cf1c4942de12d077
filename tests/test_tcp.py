"""The kernel's counters: the very connection, added up over connections, absent if not said."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator

import pytest

from protocol import tcp
from protocol.dealer import Dealer
from protocol.router import Router
from protocol.tcp import Connections, Growth, Reading, Traffic

pytestmark = pytest.mark.net

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(params=["127.0.0.1", "::1"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Both ends of a TCP connection on loopback."""
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with socket.create_server((request.param, 0), family=family) as server:
        near = socket.create_connection(server.getsockname()[:2])
        far, _ = server.accept()
    with near, far:
        yield near, far


def say(sender: socket.socket, receiver: socket.socket, size: int) -> None:
    sender.sendall(bytes(size))
    while size:
        size -= len(receiver.recv(min(size, 1 << 16)))


def test_a_connection_is_counted_from_its_beginning_and_then_by_what_is_new(pair: Pair) -> None:
    near, far = pair
    say(near, far, 1000)
    connections = Connections()
    connections.watch(b"a", near.fileno(), "pi")
    (growth,) = connections.grown()
    assert (growth.owner, growth.sent, growth.received, growth.resent) == ("pi", 1000, 0, 0)
    assert growth.is_first
    assert 0 < growth.rtt_seconds < 1
    say(far, near, 20)
    say(near, far, 3)
    (growth,) = connections.grown()
    assert (growth.sent, growth.received, growth.is_first) == (3, 20, False)
    connections.close()


def test_the_last_bytes_of_a_connection_that_is_closed_here_are_counted(pair: Pair) -> None:
    near, far = pair
    connections = Connections()
    connections.watch(b"a", near.fileno(), "pi")
    say(near, far, 77)
    near.close()
    (growth,) = connections.grown()
    assert growth.sent == 77
    assert not connections.watches(b"a")
    assert far.recv(1) == b""  # and the other end hears of it: ours is closed as well
    assert connections.grown() == []


def test_the_last_bytes_of_a_connection_that_is_closed_there_are_counted(pair: Pair) -> None:
    near, far = pair
    connections = Connections()
    connections.watch(b"a", near.fileno(), "pi")
    far.sendall(bytes(55))
    far.close()
    assert len(near.recv(100)) == 55
    assert near.recv(1) == b""
    (growth,) = connections.grown()
    assert growth.received == 55  # the kernel counts the other's FIN as a byte; we do not
    assert not connections.watches(b"a")


def test_a_number_that_stands_for_another_connection_by_now_is_let_go(pair: Pair) -> None:
    near, far = pair
    connections = Connections()
    fd = near.fileno()
    connections.watch(b"a", fd, "pi")
    say(near, far, 5)
    with socket.create_server(("127.0.0.1", 0)) as other:
        os.dup2(other.fileno(), fd)  # as when ZeroMQ closes one and accepts the next
        assert [g.sent for g in connections.grown()] == [5]
        assert not connections.watches(b"a")


def test_a_peer_that_logs_in_again_on_its_connection_is_not_counted_twice(pair: Pair) -> None:
    near, far = pair
    connections = Connections()
    connections.watch(b"a", near.fileno(), "pi")
    say(near, far, 9)
    assert [g.sent for g in connections.grown()] == [9]
    connections.watch(b"a", near.fileno(), "pi")
    assert [g.sent for g in connections.grown()] == [0]
    connections.close()


def test_what_is_no_tcp_connection_is_absent() -> None:
    left, right = socket.socketpair()
    connections = Connections()
    with left, right:
        connections.watch(b"a", left.fileno(), "pi")
    connections.watch(b"b", left.fileno(), "pi")  # -1: closed
    assert connections.grown() == []


def test_where_the_platform_says_nothing_it_is_absent(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    connections = Connections()
    connections.watch(b"a", pair[0].fileno(), "pi")
    assert connections.grown() == []


def info(size: int) -> bytes:
    """A made-up ``tcp_info`` of an established connection, as long as asked."""
    whole = bytearray(280)
    whole[0] = 1
    struct.pack_into("=I", whole, 68, 1500)
    struct.pack_into("=QQ", whole, 120, 900, 70)
    struct.pack_into("=QQ", whole, 200, 1100, 100)
    return bytes(whole[:size])


def test_what_a_kernel_says_depends_on_its_age() -> None:
    assert tcp.parse(info(280)) == Reading(1000, 900, 70, 100, 0.0015, True)
    assert tcp.parse(info(192)) == Reading(900, 900, 70, None, 0.0015, True)  # Linux 4.9
    assert tcp.parse(info(104)) is None  # Linux 3
    assert tcp.parse(b"\x08" + info(280)[1:]) == Reading(1000, 900, 69, 100, 0.0015, False)


def test_sums_go_on_over_connections_and_an_unknown_part_makes_the_sum_unknown() -> None:
    total = Traffic().plus(Growth("", 10, 20, 3, 0.1, True))
    total = total.plus(Growth("", 1, 2, 0, 0.2, False)).plus(Growth("", 5, 5, 4, 0.3, True))
    assert total == Traffic(16, 27, 7, 0.3, 2)
    assert total.plus(Growth("", 0, 0, None, 0.1, False)).resent is None


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_both_ends_of_a_connection_agree_over_a_reconnect(host: str) -> None:
    router = Router(f"tcp://{host}:*")
    dealer = Dealer(router.endpoint)
    up = down = 0
    try:
        for login in range(2):
            dealer.send([b"hello"])
            while (got := router.recv(5)) is None:
                assert router.lost_one()
            peer, _ = got
            router.watch(peer, "pi")
            for size in (0, 300, 70_000):
                router.send(peer, [bytes(size)])
                assert dealer.recv(5) == [bytes(size)]
            dealer.send([b"done"])  # so that nothing is on its way
            assert router.recv(5) is not None
            for growth in router.grown():
                up, down = up + growth.received, down + growth.sent
            traffic = dealer.traffic()
            assert traffic is not None
            assert traffic.connections == login + 1
            assert (traffic.sent, traffic.received) == (up, down)
            if login == 0:
                dealer.reconnect()
        assert up > 2 * (64 + 7 + 6)
        assert down > 2 * 70_300
    finally:
        dealer.close()
        router.close()
