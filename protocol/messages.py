"""The typed messages of protocol version 4, one union per direction.

``docs/protocol.md`` is the specification and carries its own version number; this
module implements it, and ``protocol.channel`` packs what is said here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from protocol import wire
from protocol.parts import (
    BlobId,
    Cost,
    Digest,
    Examples,
    Exchanged,
    Limits,
    Meeting,
    NodeName,
    Progress,
    Real,
    RoundNumber,
    TensorInfo,
    Text,
    Unit,
    Version,
    Vitals,
    Weight,
)
from protocol.payload import ClientId, Size, Spec
from protocol.picks import Pick


class Message(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of every message.  Unknown fields are skipped: a newer minor version added them."""


# --- both ways -------------------------------------------------------------------


LOADING, WAITING = "loading", "waiting"  # what a node does up to its ``ready``, and from then on


class Beat(Message, frozen=True, kw_only=True, tag="beat"):
    """I am alive.  A node adds what it is busy with, and how far its task is, if that is news.

    Without ``busy`` all is as the last beat that had it said, or as is understood at ``ready``.
    """

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
