"""Who is logged in: the nodes, their connections, their clients, and when they last spoke."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from coordinator.limits import Allowance
from fedalgos.limits import ENDLESS, MANY, Limit
from protocol.messages import LOADING, Hello, Refuse
from protocol.noise import STREAM
from protocol.parts import Cost, Limits, Meeting, Progress
from protocol.wire import Peer

LOADING_PATIENCE = 10.0  # times that of a node that is ready
NOWHERE = Meeting(address="", port=1)


@dataclass
class Member:
    """One logged-in node.  Identity is its name; ``peer`` is only today's connection."""

    hello: Hello
    peer: Peer
    seen: float
    version: int | None = None  # of its parameters; None until it is ready
    space: bytes = b""
    digest: bytes = b""  # of its parameters, as it said or as it was sent them
    meeting: Meeting = NOWHERE  # where other nodes meet it
    result: bytes = b""  # digest of what it has made of its last collective, and not yet applied
    busy: str = LOADING
    progress: Progress | None = None  # of the task that it runs, as it last said
    peaks: dict[str, int] = field(default_factory=dict)  # phase -> resident bytes
    allowance: Allowance = field(default_factory=Allowance)
    probe: float | None = None  # seconds of one inference, as it has measured before the run

    @property
    def name(self) -> str:
        return self.hello.node

    @property
    def limit(self) -> Limit | None:
        """Of what a round may take here and can be planned, if it has said one."""
        said = self.hello.limits or Limits()
        passes = min(MANY, said.seconds / self.probe) if said.seconds and self.probe else None
        if said.bytes is None and passes is None:
            return None
        nbytes = ENDLESS if said.bytes is None else said.bytes
        return Limit(nbytes, len(self.hello.clients), passes)

    @property
    def trains(self) -> bool:
        return self.hello.role == "train"

    @property
    def is_idle(self) -> bool:
        """Whether it trains, and has answered all it was asked."""
        a = self.allowance
        return self.trains and self.version is not None and a.answers >= a.asked

    def is_silent(self, now: float, patience_seconds: float) -> bool:
        """Whether it has said nothing for too long.

        While it loads it may for longer: libraries do not let its other threads talk meanwhile.
        """
        times = 1.0 if self.version is not None else LOADING_PATIENCE
        return now - self.seen > times * patience_seconds

    def add_costs(self, costs: tuple[Cost, ...]) -> None:
        """Keep each phase's highest resident peak, for the live view and the summary."""
        for cost in costs:
            if cost.rss is not None:
                self.peaks[cost.phase] = max(self.peaks.get(cost.phase, 0), cost.rss)


class Roster:
    """The members by name and by connection."""

    def __init__(self, num_clients: int, software: str) -> None:
        self._num_clients = num_clients
        self._software = software
        self._by_name: dict[str, Member] = {}
        self._probes: dict[str, float] = {}  # a later login does not say it again

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._by_name.values()))

    def refuse(self, hello: Hello) -> Refuse | None:
        """Why this login cannot be, or None."""
        for what, theirs, ours in (
            ("seedwire", hello.software, self._software),
            ("noise stream", hello.stream, STREAM),
        ):
            if theirs != ours:
                reason = f"node {hello.node} has {what} {theirs}, the coordinator has {ours}"
                return Refuse(code="version", reason=f"{reason}: install the same version")
        holder = self._by_name.get(hello.node)
        if holder is not None and holder.hello.role != hello.role:
            reason = f"the name {hello.node} belongs to a node of another role"
            return Refuse(code="clients", reason=reason)
        if hello.role == "evaluate":
            others = (m.name for m in self if not m.trains and m.name != hello.node)
            if (evaluator := next(others, None)) is not None:
                reason = f"node {evaluator} evaluates this run already"
                return Refuse(code="clients", reason=reason)
            return None
        if not hello.clients:
            return Refuse(code="clients", reason=f"node {hello.node} hosts no client")
        if max(hello.clients) >= self._num_clients:
            reason = f"client {max(hello.clients)}: the experiment has {self._num_clients} clients"
            return Refuse(code="clients", reason=f"{reason}, numbered from 0")
        for other in self:
            both = set(other.hello.clients).intersection(hello.clients)
            if both and other.name != hello.node:
                return Refuse(
                    code="clients",
                    reason=f"client {min(both)} is already hosted by node {other.name}",
                )
        return None

    def is_overtaken(self, hello: Hello) -> bool:
        """Whether the same process has logged in again since it said this.

        A node that gets no answer tries on a new connection, and what it said on the old
        one may still be read after that.
        """
        member = self._by_name.get(hello.node)
        return (
            member is not None
            and (member.hello.host, member.hello.pid) == (hello.host, hello.pid)
            and member.hello.login > hello.login
        )

    def admit(self, hello: Hello, peer: Peer, now: float) -> tuple[Member, Member | None]:
        """Log a node in, at once; returns it and the earlier login that this one supersedes."""
        old = self._by_name.get(hello.node)
        self._by_name[hello.node] = member = Member(hello, peer, now)
        member.probe = self._probes.get(hello.node)
        return member, old

    def probed(self, member: Member, costs: tuple[Cost, ...]) -> None:
        """Keep how long an inference takes, if this says so."""
        for cost in costs:
            if cost.phase == "inference" and cost.seconds > 0:
                self._probes[member.name] = member.probe = cost.seconds

    def drop(self, member: Member) -> None:
        if self._by_name.get(member.name) is member:
            del self._by_name[member.name]

    def forget(self, name: str) -> None:
        """Of a node that has long been gone."""
        self._probes.pop(name, None)

    def at(self, peer: Peer) -> Member | None:
        """Who speaks on this connection."""
        return next((m for m in self if m.peer == peer), None)

    def host_of(self, client: int) -> Member | None:
        """The ready node that hosts this client."""
        ready = (m for m in self if m.trains and m.version is not None)
        return next((m for m in ready if client in m.hello.clients), None)

    def evaluator(self) -> Member | None:
        """The ready evaluator."""
        return next((m for m in self if not m.trains and m.version is not None), None)

    def silent(self, now: float, patience_seconds: float) -> list[Member]:
        """Members that have said nothing for too long."""
        return [m for m in self if m.is_silent(now, patience_seconds)]
