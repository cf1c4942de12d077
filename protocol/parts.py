"""What messages are made of: fields with their bounds, and the structs within them."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from protocol.payload import ClientId, Size

Text = Annotated[str, Meta(max_length=2000)]
NodeName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")]  # $ lets "\n" in
Digest = Annotated[bytes, Meta(min_length=16, max_length=16)]
Version = Annotated[int, Meta(ge=0, lt=1 << 53)]
RoundNumber = Annotated[int, Meta(ge=0, lt=1 << 31)]
BlobId = Annotated[int, Meta(ge=0, lt=1 << 53)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Real = Annotated[float, Meta(ge=-1e30, le=1e30)]  # both bounds: refuses inf and NaN
Examples = Annotated[int, Meta(ge=0, lt=1 << 40)]
Weight = Annotated[int, Meta(ge=1, lt=1 << 40)]  # a mean of weight 0 does not exist
Unit = Annotated[int, Meta(ge=0, lt=1 << 20)]

Joules = Annotated[float, Meta(ge=0, le=1e12)]
Celsius = Annotated[float, Meta(ge=-273.15, le=1000)]

Phase = Literal[
    "bare",
    "load",
    "inference",
    "catch-up",
    "train",
    "encode",
    "reduce",
    "evaluate",
    "wait",
    "transfer",
    "upload",
]


class TensorInfo(Struct, frozen=True):
    """A trained tensor: its name in the saved checkpoint, its shape, and its unit."""

    name: Annotated[str, Meta(max_length=512)]
    shape: Annotated[tuple[Size, ...], Meta(max_length=8)]
    unit: Annotated[str, Meta(max_length=512)]


class Cost(Struct, frozen=True, array_like=True):
    """What one phase took on a node.  Absent is None, never zero.

    Attributes:
        rss: peak resident bytes of the process during the phase.
        cuda: peak allocated bytes on the device during the phase.
        reserved: peak bytes that the device's allocator held during the phase.
        joules: of the whole machine during the phase.
    """

    phase: Phase
    seconds: Seconds
    rss: Size | None = None
    cuda: Size | None = None
    reserved: Size | None = None
    joules: Joules | None = None


class Vitals(Struct, frozen=True, omit_defaults=True):
    """A node's process and machine, just now.  What is not known is None, never zero.

    Attributes:
        pss: resident bytes, with shared pages counted in shares.
        swap: bytes of the process that are swapped out.
        group_peak: bytes at most of its memory control group, since that was made.
        is_unified: the CUDA device has no memory of its own, as on a Jetson.
        nvmap: bytes that the process holds for that device there, which are not resident.
        celsius: of the hottest sensor.
        throttled: why the machine has run slower than it can since the node started; "" if
            it has not.
        sent, received, resent: bytes of the node's connections, as its own kernel counts
            them (protocol.tcp.Traffic).
        rtt: seconds, smoothed by the kernel.
    """

    pss: Size | None = None
    swap: Size | None = None
    group_peak: Size | None = None
    is_unified: bool = False
    nvmap: Size | None = None
    celsius: Celsius | None = None
    throttled: Text | None = None
    sent: Size | None = None
    received: Size | None = None
    resent: Size | None = None
    rtt: Seconds | None = None


class Meeting(Struct, frozen=True, kw_only=True):
    """Where a node can be met by others, for a collective."""

    address: Text  # a number, IPv4 or IPv6
    port: Annotated[int, Meta(ge=1, le=65_535)]


class Exchanged(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a node has sent to other nodes, and received from them, in one collective.

    Attributes:
        payload, message: bytes each way, as they are in our own count.
        sent, received, resent: by its kernel's count of the very connections.
    """

    payload: Size = 0
    message: Size = 0
    sent: Size | None = None
    received: Size | None = None
    resent: Size | None = None


class Progress(Struct, frozen=True, kw_only=True, array_like=True):
    """How far a task is, in mini-batches."""

    round: RoundNumber
    client: ClientId
    done: Examples
    total: Examples


class Limits(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a node lets a round take; None: as much as it needs.

    Attributes:
        memory: resident bytes of its process.
        bytes: of payload, both ways, for all its clients together.
        seconds: of one task.
    """

    memory: Size | None = None
    bytes: Size | None = None
    seconds: Annotated[float, Meta(gt=0, le=1e9)] | None = None
