"""The typed messages of protocol version 3, one union per direction.

``docs/protocol.md`` is the specification and carries its own version number; this
module implements it.  ``Channel`` packs one direction and unpacks it with every
field checked, so a bad message is refused with the path of the fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from protocol import wire
from protocol.payload import ClientId, Size, Spec
from protocol.picks import Pick
from protocol.wire import Frame, LocalProtocolError, RemoteProtocolError

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


class Message(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of every message.  Unknown fields are skipped: a newer minor version added them."""


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


class Progress(Struct, frozen=True, kw_only=True):
    """How far a task is, in mini-batches."""

    round: RoundNumber
    client: ClientId
    done: Examples
    total: Examples


# --- both ways -------------------------------------------------------------------


class Beat(Message, frozen=True, kw_only=True, tag="beat"):
    """I am alive.  A node adds what it is busy with, and how far the task is that it runs."""

    busy: Text = ""
    progress: Progress | None = None


class Pull(Message, frozen=True, kw_only=True, tag="pull"):
    """Send me ``nbytes`` of this blob from ``offset``: one credit of the receiver."""

    blob: BlobId
    offset: Size
    nbytes: Annotated[int, Meta(ge=1, le=wire.MAX_INLINE_BYTES)]


class Chunk(Message, frozen=True, kw_only=True, tag="chunk"):
    """The answer to one pull, with one buffer.  ``gone``: the blob is no longer there."""

    blob: BlobId
    offset: Size
    gone: bool = False


class Bye(Message, frozen=True, kw_only=True, tag="bye"):
    """An orderly end.  ``finished`` tells a node that the whole run is over."""

    reason: Text = ""
    finished: bool = False


class Carrier(Message, frozen=True, kw_only=True):
    """A message with a payload, in its buffer or, where ``blob`` is set, to be pulled."""

    payload: Spec | None = None
    blob: BlobId | None = None


# --- node -> coordinator ---------------------------------------------------------


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


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """Login: who I am, what I run, which clients I host."""

    node: NodeName
    software: Text  # must equal the coordinator's: the methods are part of the contract
    stream: Text  # the noise stream, see docs/noise.md
    clients: Annotated[tuple[ClientId, ...], Meta(max_length=wire.MAX_ARRAY)] = ()
    role: Literal["train", "evaluate"] = "train"
    host: Text = ""
    pid: Size = 0
    login: Version = 0  # counts up within a process: a Hello that was overtaken is not obeyed
    memory_limit: Size | None = None  # of the process's control group
    oom_kills: Size | None = None  # in it so far, by the kernel
    limits: Limits | None = None


class Enroll(Message, frozen=True, kw_only=True, tag="enroll"):
    """By a token, and nothing else by one: this is my own public key."""

    node: NodeName
    key: Annotated[bytes, Meta(min_length=32, max_length=32)]


class Ready(Carrier, frozen=True, kw_only=True, tag="ready"):
    """The model and data are loaded.  The evaluator adds the space and the parameters."""

    version: Version
    digest: Digest
    space: Digest
    tensors: Annotated[tuple[TensorInfo, ...], Meta(max_length=wire.MAX_ARRAY)] = ()
    costs: tuple[Cost, ...] = ()
    vitals: Vitals | None = None  # from time to time
    meeting: Meeting | None = None  # of a method whose nodes average among themselves


class Update(Carrier, frozen=True, kw_only=True, tag="update"):
    """One client's contribution to one round, and what it cost."""

    round: RoundNumber
    attempt: RoundNumber = 0
    client: ClientId
    examples: Weight
    loss: Real
    costs: tuple[Cost, ...] = ()
    vitals: Vitals | None = None  # from time to time


class Failed(Message, frozen=True, kw_only=True, tag="failed"):
    """A task ended without an update."""

    round: RoundNumber
    attempt: RoundNumber = 0
    client: ClientId
    reason: Text


class Reduced(Carrier, frozen=True, kw_only=True, tag="reduced"):
    """The answer to a ``reduce``; the lowest rank brings the step along.

    Attributes:
        digest: of the parameters that the step makes; None if it came to nothing.
        fault: why it came to nothing.
    """

    round: RoundNumber
    attempt: RoundNumber = 0
    digest: Digest | None = None
    fault: Text = ""
    exchanged: Exchanged = Exchanged()
    costs: tuple[Cost, ...] = ()


class Score(Message, frozen=True, kw_only=True, tag="score"):
    """The answer to an ``evaluate``: mean loss and accuracy over the test set.

    Of a causal task both are over the tokens that are scored; ``rouge_l`` is of answers
    that the model wrote after the last round.
    """

    version: Version
    loss: Real
    metric: Real
    examples: Examples
    costs: tuple[Cost, ...] = ()
    rouge_l: Annotated[float, Meta(ge=0, le=1)] | None = None


class Sync(Message, frozen=True, kw_only=True, tag="sync"):
    """I hold ``version`` and cannot go on from it: send a snapshot."""

    version: Version
    reason: Text


# --- coordinator -> node ---------------------------------------------------------


class Welcome(Message, frozen=True, kw_only=True, tag="welcome"):
    """You are in; this is the experiment (a plain table, see protocol.experiment)."""

    run: Text
    experiment: dict[str, Any]


class Enrolled(Message, frozen=True, kw_only=True, tag="enrolled"):
    """Your key is admitted: connect with it."""


RefuseCode = Literal["login", "version", "clients", "superseded", "breach", "key", "limits"]


class Refuse(Message, frozen=True, kw_only=True, tag="refuse"):
    """You are not in.  The layout of this one message is the same in every version."""

    code: Annotated[str, Meta(max_length=32)]  # a RefuseCode; kept open for later versions
    reason: Text


class Task(Message, frozen=True, kw_only=True, tag="task"):
    """Train this client from this version of the parameters."""

    round: RoundNumber
    attempt: RoundNumber = 0
    client: ClientId
    version: Version
    units: Annotated[
        tuple[Unit, ...], Meta(max_length=wire.MAX_ARRAY)
    ] = ()  # what to train; empty means everything
    lr: Annotated[float, Meta(gt=0, le=2e6)] | None = None  # null: the method's own
    picks: Annotated[tuple[Pick, ...], Meta(max_length=wire.MAX_ARRAY)] = ()  # see fedalgos
    tier: Annotated[int, Meta(ge=0, lt=1024)] | None = None  # null: the client's own


class Reduce(Message, frozen=True, kw_only=True, tag="reduce"):
    """Average the round's updates with the other nodes that hold some.

    Attributes:
        version: of the parameters that the updates are changes of.
        clients: of this node, whose updates count.
        examples: of all nodes' clients together.
        rank, ranks: this node's place among the nodes, and how many there are.
        address: this node's own.
        meeting: of the node with rank 0.
        seconds: for how long to wait for another.
    """

    round: RoundNumber
    attempt: RoundNumber = 0
    version: Version
    clients: Annotated[tuple[ClientId, ...], Meta(min_length=1, max_length=wire.MAX_ARRAY)]
    examples: Annotated[int, Meta(ge=1, lt=1 << 62)]  # a weight of each client
    rank: Annotated[int, Meta(ge=0, lt=1 << 16)]
    ranks: Annotated[int, Meta(ge=1, le=1 << 16)]
    address: Text
    meeting: Meeting
    seconds: Annotated[float, Meta(gt=0, le=1e6)]


class Step(Carrier, frozen=True, kw_only=True, tag="step"):
    """A committed round: applying it to ``version - 1`` gives ``version``.

    With ``snapshot`` the payload is the parameters themselves and any version will do.
    Without a payload it is what the node itself has answered to the last ``reduce``.
    """

    version: Version
    round: RoundNumber
    digest: Digest
    snapshot: bool = False


class Evaluate(Message, frozen=True, kw_only=True, tag="evaluate"):
    """Score this version on the test set; after the last one, export the model."""

    version: Version
    last: bool = False


class Reject(Message, frozen=True, kw_only=True, tag="reject"):
    """Your update will not count, and why; forget it."""

    round: RoundNumber
    attempt: RoundNumber = 0
    client: ClientId
    reason: Text


Both = Beat | Pull | Chunk | Bye
ToCoordinator = Hello | Enroll | Ready | Update | Failed | Reduced | Score | Sync | Both
ToNode = Welcome | Enrolled | Refuse | Task | Reduce | Step | Evaluate | Reject | Both

M = TypeVar("M", bound=Message)


class Channel(Generic[M]):
    """Packs and unpacks the messages of one direction."""

    def __init__(self, union: Any) -> None:
        self._union = union

    def pack(self, message: M, buffer: Frame | None = None) -> list[Frame]:
        """Encode to frames; what the other side would refuse does not leave here.

        Raises:
            LocalProtocolError: a field is out of bounds, or the buffer does not fit.
        """
        buffers = [] if buffer is None else [buffer]
        if (why := _misfit(message, buffers)) is not None:
            raise LocalProtocolError(why)
        body = msgspec.to_builtins(message, builtin_types=(bytes,))
        try:
            msgspec.convert(body, self._union)
        except msgspec.ValidationError as error:
            raise LocalProtocolError(f"{type(message).__name__}: {error}") from error
        for cost in body.get("costs", ()):
            while cost[-1] is None:
                cost.pop()
        return wire.pack(body, buffers)

    def unpack(self, frames: Sequence[Frame]) -> tuple[M, Frame | None]:
        """Decode frames.

        Raises:
            VersionError: another protocol version.
            RemoteProtocolError: anything else that ``pack`` could not have produced.
        """
        body, buffers = wire.unpack(frames)
        try:
            message: M = msgspec.convert(body, self._union)
        except (msgspec.ValidationError, RecursionError) as error:
            raise RemoteProtocolError(str(error) or "nested too deeply") from error
        if (why := _misfit(message, buffers)) is not None:
            raise RemoteProtocolError(why)
        return message, buffers[0] if buffers else None


to_coordinator: Channel[ToCoordinator] = Channel(ToCoordinator)
to_node: Channel[ToNode] = Channel(ToNode)


def read_refusal(frames: Sequence[Frame]) -> Refuse | None:
    """A refusal from a peer of any protocol version, or None if it is something else."""
    try:
        body, _ = wire.unpack(frames, any_version=True)
        message: object = msgspec.convert(body, ToNode)  # a union, so that the tag is required
    except (RemoteProtocolError, msgspec.ValidationError, RecursionError):
        return None
    return message if isinstance(message, Refuse) else None


def _misfit(message: Message, buffers: Sequence[Frame]) -> str | None:
    """Say why the buffers do not fit the message, or None."""
    if isinstance(message, Chunk):
        expected = 0 if message.gone else 1
    elif isinstance(message, Carrier):
        if message.blob is not None and message.payload is None:
            return "a blob without a payload"
        expected = int(message.payload is not None and message.blob is None)
    else:
        expected = 0
    if len(buffers) != expected:
        return f"{len(buffers)} buffers, want {expected}"
    if buffers and isinstance(message, Carrier) and message.payload is not None:
        got, want = len(buffers[0]), message.payload.nbytes
        return None if got == want else f"buffer of {got} bytes, spec says {want}"
    return None
