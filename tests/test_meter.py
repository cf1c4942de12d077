"""Byte counting: every frame with its framing, on the right account."""

from __future__ import annotations

import zlib
from typing import Any

import pytest

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
from protocol.meter import Key, Meter, kind_of, payload_bytes, zmtp_bytes
from protocol.payload import DenseSpec

KEY = Key("a", "up", "update")
DIGEST = bytes(16)
PLACE: dict[str, Any] = {"round": 1, "attempt": 0, "client": 0}


@pytest.mark.parametrize(
    ("size", "on_the_wire"), [(0, 2), (1, 3), (255, 257), (256, 265), (1 << 20, (1 << 20) + 9)]
)
def test_a_frame_has_a_flag_byte_and_a_short_or_a_long_length(size: int, on_the_wire: int) -> None:
    assert zmtp_bytes(size) == on_the_wire


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
