"""Byte counting: every frame with its framing, on the right account."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import zmq

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
    Reject,
    Score,
    Step,
    Sync,
    Task,
    Update,
    Welcome,
)
from protocol.meter import (
    HANDSHAKE,
    OTHERS,
    Around,
    Gap,
    Key,
    Mechanism,
    Meter,
    kind_of,
    payload_bytes,
    zmtp_bytes,
)
from protocol.parts import Exchanged
from protocol.payload import DenseSpec
from protocol.tcp import Connections, Growth, Traffic

KEY = Key("a", "up", "update")


def sizes(messages: list[list[bytes]]) -> list[int]:
    """Of their last frames."""
    return [len(frames[-1]) for frames in messages]


DIGEST = bytes(16)
PLACE: dict[str, Any] = {"round": 1, "attempt": 0, "client": 0}


@pytest.mark.parametrize(
    ("size", "on_the_wire"), [(0, 2), (1, 3), (255, 257), (256, 265), (1 << 20, (1 << 20) + 9)]
)
def test_a_frame_has_a_flag_byte_and_a_short_or_a_long_length(size: int, on_the_wire: int) -> None:
    assert zmtp_bytes(size) == on_the_wire


@pytest.mark.parametrize(("size", "on_the_wire"), [(0, 35), (1, 36), (222, 257), (223, 265)])
def test_encryption_adds_33_bytes_to_a_frame(size: int, on_the_wire: int) -> None:
    """RFC 26: a command's name, a nonce of 8 bytes, 16 of authenticator, a flag byte."""
    assert zmtp_bytes(size, "curve") == on_the_wire


@pytest.mark.parametrize("mechanism", ["null", "curve"])
def test_what_is_counted_is_to_the_byte_what_the_kernel_counts(mechanism: Mechanism) -> None:
    """Over a real connection: handshake, frames short and long, and a frame of nothing."""
    with (
        zmq.Context() as context,
        context.socket(zmq.ROUTER) as router,
        context.socket(zmq.DEALER) as dealer,
    ):
        if mechanism == "curve":
            public, secret = zmq.curve_keypair()
            router.curve_server, router.curve_secretkey = 1, secret
            dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()
            dealer.curve_serverkey = public
        dealer.connect(f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}")
        meter, connections = Meter(mechanism), Connections()
        meter.connected("a")
        messages = [[b"\x03", bytes(n)] for n in (0, 1, 221, 222, 223, 254, 255, 256, 1 << 20)]
        for frames in messages:
            dealer.send_multipart(frames)
            peer, *got = router.recv_multipart(copy=False)
            connections.watch(b"", int(peer.get(zmq.SRCFD)), "a")
            assert [frame.bytes for frame in got] == frames
            meter.count(Key("a", "up", "update"), frames, 0)
            router.send_multipart([peer.bytes, *frames])
            assert dealer.recv_multipart() == frames
            meter.count(Key("a", "down", "step"), frames, 0)
        for growth in connections.grown():
            meter.grown(growth)
        connections.close()
    for gap in meter.gaps().values():
        assert gap.ours == gap.kernel
    num_frames, framing = 2 * len(messages), sum(2 + 2 + 7 * (n > 255) for n in sizes(messages))
    assert meter.around[Around("a", "up", "curve")] == 33 * num_frames * (mechanism == "curve")
    assert mechanism == "curve" or meter.around[Around("a", "up", "zmtp")] == framing
    assert meter.message[Key("a", "up", "handshake")] == HANDSHAKE[mechanism]["up"]


def test_the_kernel_is_known_only_of_nodes_that_it_counts() -> None:
    meter = Meter()
    meter.count(KEY, [b"\x01"], 0)
    assert meter.gaps() == {}
    meter.grown(Growth("a", 7, 9, 0, 0.1, True))
    meter.grown(Growth("a", 1, 2, 4, 0.2, False))
    assert meter.traffic == {"a": Traffic(8, 11, 4, 0.2, 1)}
    assert meter.gaps() == {("a", "up"): Gap(3, 11), ("a", "down"): Gap(0, 8)}


def test_messages_add_up_per_key() -> None:
    meter = Meter()
    meter.count(KEY, [b"\x01", bytes(300), bytes(20)], 20)
    meter.count(KEY, [b"\x01", memoryview(bytes(10))], 0)
    meter.count(Key("a", "down", "update"), [b""], 0)
    meter.count(Key("b", "up", "update"), [b"xy"], 2)
    assert meter.message[KEY] == (3 + 309 + 22) + (3 + 12)
    assert meter.payload[KEY] == 20
    assert meter.message[Key("a", "down", "update")] == 2
    assert meter.message[Key("b", "up", "update")] == 4
    assert meter.message[Key("b", "down", "update")] == 0


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (Step(version=1, round=1, digest=DIGEST), "step"),
        (Step(version=1, round=0, digest=DIGEST, snapshot=True), "model"),
        (Ready(version=0, digest=DIGEST, space=DIGEST), "model"),
        (Update(**PLACE, examples=1, loss=0.0), "update"),
        (Task(**PLACE, version=0), "task"),
        (Evaluate(version=0), "evaluate"),
        (Score(version=0, loss=0.0, metric=0.0, examples=1), "evaluate"),
        (Beat(), "heartbeat"),
        (Hello(node="a", software="1", stream="s"), "control"),
        (Welcome(run="r", experiment={}), "control"),
        (Refuse(code="login", reason=""), "control"),
        (Reject(**PLACE, reason=""), "control"),
        (Failed(**PLACE, reason=""), "control"),
        (Sync(version=0, reason=""), "control"),
        (Bye(), "control"),
        (Pull(blob=1, offset=0, nbytes=1), "control"),
        (Chunk(blob=1, offset=0), "control"),
    ],
)
def test_each_message_is_on_its_account(message: Message, kind: str) -> None:
    assert kind_of(message) == kind


def test_payload_is_the_buffer_of_what_carries_one() -> None:
    update = Update(**PLACE, examples=1, loss=0.0, payload=DenseSpec(2))
    assert payload_bytes(update, bytes(8)) == 8
    assert payload_bytes(Chunk(blob=1, offset=0), memoryview(bytes(5))) == 5
    assert payload_bytes(update, None) == 0
    assert payload_bytes(Beat(), b"x") == 0


def test_kinds_are_told_by_the_message_alone() -> None:
    """The account is a fact about the message, so both ends agree on it."""
    step = Step(version=1, round=1, digest=zlib.crc32(b"").to_bytes(16, "big"), blob=3)
    assert kind_of(step) == "step"


def test_a_node_that_is_counted_among_the_others_changes_no_sum() -> None:
    meter = Meter()
    for node, size in (("a", 10), ("b", 300), ("c", 5)):
        meter.count(Key(node, "up", "update"), [bytes(size)], size)
        meter.connected(node)
        meter.grown(Growth(node, size, 2 * size, 0, 0.1, True))
    meter.exchanged("a", Exchanged(message=7, sent=7, received=7))
    before = sum(meter.message.values()), sum(meter.payload.values())
    meter.merge("a")
    meter.merge("b")
    assert (sum(meter.message.values()), sum(meter.payload.values())) == before
    assert meter.payload[Key(OTHERS, "up", "update")] == 310
    assert meter.traffic == {
        "c": Traffic(5, 10, 0, 0.1, 1),
        OTHERS: Traffic(317, 627, 0, 0.1, 2),
    }
    assert {key.node for key in meter.message} == {"c", OTHERS}
    assert meter.gaps()[OTHERS, "down"].kernel == 310
    meter.grown(Growth("a", 3, 4, 0, 0.1, True))  # it is back, and begins anew
    assert (meter.gaps()["a", "up"].kernel, meter.gaps()["a", "down"].kernel) == (4, 3)
