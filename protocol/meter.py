"""Byte counting where the bytes pass: per peer, direction, kind and level.

Payload is what the method asked for; message adds the msgpack body and ZMTP's framing.
The kernel's own count joins them as a third level later, under the same keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from protocol.messages import (
    Beat,
    Carrier,
    Chunk,
    Evaluate,
    Message,
    Ready,
    Score,
    Step,
    Task,
    Update,
)
from protocol.wire import Frame

Kind = Literal["model", "task", "update", "step", "evaluate", "control", "heartbeat"]
Way = Literal["up", "down"]


class Key(NamedTuple):
    node: str
    way: Way
    kind: Kind


class Meter:
    """Running totals; a reader takes differences."""

    def __init__(self) -> None:
        self.payload: Counter[Key] = Counter()
        self.message: Counter[Key] = Counter()

    def count(self, key: Key, frames: Sequence[Frame], payload: int) -> None:
        """Add one message."""
        self.payload[key] += payload
        self.message[key] += sum(zmtp_bytes(len(frame)) for frame in frames)


def zmtp_bytes(size: int) -> int:
    """A frame on the wire: flags, then a length of 1 or 8 bytes (ZMTP 3, RFC 23)."""
    return size + (2 if size < 256 else 9)


def kind_of(message: Message) -> Kind:
    """Which account a message goes to; chunks and pulls go to their blob's instead."""
    match message:
        case Step(snapshot=snapshot):
            return "model" if snapshot else "step"
        case Ready():
            return "model"
        case Update():
            return "update"
        case Task():
            return "task"
        case Evaluate() | Score():
            return "evaluate"
        case Beat():
            return "heartbeat"
        case _:
            return "control"


def payload_bytes(message: Message, buffer: Frame | None) -> int:
    """Bytes of the buffer that are the method's own numbers."""
    return len(buffer) if buffer is not None and isinstance(message, Carrier | Chunk) else 0
