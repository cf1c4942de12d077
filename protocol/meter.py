"""Byte counting where the bytes pass: per node, direction, kind and level.

Payload is what the method asked for; message adds the msgpack body and all that ZeroMQ puts
around it, so that it should come to what the kernel counts on the same connections.  That
count is the third level; it knows no kinds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from protocol.messages import (
    Beat,
    Carrier,
    Chunk,
    Evaluate,
    Message,
    Ready,
    Reduce,
    Reduced,
    Score,
    Step,
    Task,
    Update,
)
from protocol.parts import Exchanged
from protocol.tcp import Growth, Traffic
from protocol.wire import Frame

Kind = Literal[
    "model",
    "task",
    "update",
    "collective",
    "step",
    "evaluate",
    "control",
    "heartbeat",
    "handshake",
]
Way = Literal["up", "down"]
Layer = Literal["zmtp", "curve"]
Mechanism = Literal["null", "curve"]

# What ZeroMQ says before the first message: the greeting (64), then commands, of which each
# carries the socket's type and an empty identity (RFC 23, RFC 26).
HANDSHAKE: dict[Mechanism, dict[Way, int]] = {
    "null": {"up": 64 + 43, "down": 64 + 43},  # READY
    "curve": {"up": 64 + 202 + 301, "down": 64 + 170 + 67},  # HELLO, INITIATE; WELCOME, READY
}
BOX_BYTES = 33  # CURVE makes a command of each frame: name 8, nonce 8, authenticator 16, flags 1


OTHERS = "(others)"  # no node's name: the sum of those that are not kept account of one by one


class Key(NamedTuple):
    node: str
    way: Way
    kind: Kind


class Around(NamedTuple):
    """An account of what ZeroMQ puts around frames."""

    node: str
    way: Way
    layer: Layer


class Gap(NamedTuple):
    """Our own count beside the kernel's, of one node and direction.

    Attributes:
        ours: bytes of all messages, with framing, encryption and handshakes.
        kernel: bytes on the node's connections, each counted once.
    """

    ours: int
    kernel: int


class Meter:
    """Running totals; a reader takes differences.

    Args:
        mechanism: how the connections are secured.

    Attributes:
        around: what of the messages is framing and encryption.
        traffic: what the kernel says, by node; one that is not here is not counted by it.
        moved: nodes of whose connections one has ended, or is not their first; whoever has
            taken note takes them out.
    """

    def __init__(self, mechanism: Mechanism = "null") -> None:
        self.payload: Counter[Key] = Counter()
        self.message: Counter[Key] = Counter()
        self.around: Counter[Around] = Counter()
        self.traffic: dict[str, Traffic] = {}
        self.moved: set[str] = set()
        self._mechanism: Mechanism = mechanism
        self._apart: Counter[tuple[str, Way]] = (
            Counter()
        )  # of ``traffic``, not on connections to us
        self._half_seen: set[str] = set()  # nodes whose kernel does not count what others do not

    def count(self, key: Key, frames: Sequence[Frame], payload: int) -> None:
        """Add one message."""
        self.payload[key] += payload
        sizes = [len(frame) for frame in frames]
        total = sum(zmtp_bytes(size, self._mechanism) for size in sizes)
        boxes = BOX_BYTES * len(sizes) if self._mechanism == "curve" else 0
        self.message[key] += total
        self.around[Around(key.node, key.way, "zmtp")] += total - boxes - sum(sizes)
        self.around[Around(key.node, key.way, "curve")] += boxes

    def add(self, node: str, other: Meter) -> None:
        """Add another meter's messages, whoever's they were there, to a node's."""
        for key, nbytes in other.payload.items():
            self.payload[key._replace(node=node)] += nbytes
        for key, nbytes in other.message.items():
            self.message[key._replace(node=node)] += nbytes
        for around, nbytes in other.around.items():
            self.around[around._replace(node=node)] += nbytes

    def connected(self, node: str) -> None:
        """Add the handshake of one connection."""
        if self.message[Key(node, "up", "handshake")]:
            self.moved.add(node)
        for way, nbytes in HANDSHAKE[self._mechanism].items():
            self.message[Key(node, way, "handshake")] += nbytes

    def grown(self, growth: Growth) -> None:
        """Add what the kernel has counted; the coordinator's end sends down."""
        if growth.is_last:
            self.moved.add(growth.owner)
        if growth.owner not in self._half_seen:
            self.traffic[growth.owner] = self.traffic.get(growth.owner, Traffic()).plus(growth)

    def exchanged(self, node: str, found: Exchanged) -> None:
        """Add what a node says of a collective: what it has sent is up, what came is down."""
        for way in get_args(Way):
            key = Key(node, way, "collective")
            self.payload[key] += found.payload
            self.message[key] += found.message
        if found.sent is None or found.received is None:
            self._half_seen.add(node)
            self.traffic.pop(node, None)
        elif (past := self.traffic.get(node)) is not None:
            # as our end of a connection would count it; ``resent`` is what we have sent again
            growth = Growth(node, found.received, found.sent, 0, past.rtt_seconds, False)
            self.traffic[node] = past.plus(growth)
            self._apart[node, "up"] += found.sent
            self._apart[node, "down"] += found.received

    def merge(self, node: str) -> None:
        """Count a node among the others from now on."""
        for way in get_args(Way):
            for kind in get_args(Kind):
                for counter in (self.payload, self.message):
                    if (count := counter.pop(Key(node, way, kind), None)) is not None:
                        counter[Key(OTHERS, way, kind)] += count
            for layer in get_args(Layer):
                if (count := self.around.pop(Around(node, way, layer), None)) is not None:
                    self.around[Around(OTHERS, way, layer)] += count
            self._apart[OTHERS, way] += self._apart.pop((node, way), 0)
        self.moved.discard(node)
        if (traffic := self.traffic.pop(node, None)) is not None:
            self.traffic[OTHERS] = self.traffic.get(OTHERS, Traffic()).merged(traffic)

    def gaps(self) -> dict[tuple[str, Way], Gap]:
        """Our count beside the kernel's, of each node that it knows, on its connections to us."""
        ours: Counter[tuple[str, Way]] = Counter()
        for key, nbytes in self.message.items():
            if key.kind != "collective":  # on other connections
                ours[key.node, key.way] += nbytes
        found: dict[tuple[str, Way], Gap] = {}
        for node, traffic in self.traffic.items():
            up, down = self._apart[node, "up"], self._apart[node, "down"]
            found[node, "up"] = Gap(ours[node, "up"], traffic.received - up)
            found[node, "down"] = Gap(ours[node, "down"], traffic.sent - down)
        return found


def zmtp_bytes(size: int, mechanism: Mechanism = "null") -> int:
    """A frame on the wire: flags, then a length of 1 or 8 bytes (ZMTP 3, RFC 23)."""
    if mechanism == "curve":
        size += BOX_BYTES
    return size + (2 if size < 256 else 9)


def kind_of(message: Message) -> Kind:
    """Which account a message goes to; chunks and pulls go to their blob's instead."""
    match message:
        case Step(snapshot=snapshot):
            return "model" if snapshot else "step"
        case Ready():
            return "model"
        case Update() | Reduced():
            return "update"
        case Task() | Reduce():
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
