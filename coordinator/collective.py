"""A round that its nodes aggregate among themselves: who takes part, and how it went.

The coordinator names the nodes and their order, and waits for all of them: each says the
digest of what it has now, one brings the step along.  It is a commit as any other, or
none.  No I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from coordinator.events import Commit
from coordinator.roster import Member
from protocol.messages import Reduce, Reduced
from protocol.wire import Frame, RemoteProtocolError


@dataclass
class Collective:
    """What has been asked for, until everybody has answered or is gone.

    Attributes:
        commit: the round, and the updates that count.
        closes_at: when it is given up.
        waiting: nodes that have not answered.
        lost: nodes that will not, and why.
        faults: what nodes say that it failed of.
        digests: of the parameters that each node has now.
        step: what the node with rank 0 has brought.
    """

    commit: Commit
    closes_at: float
    waiting: set[str] = field(default_factory=set)
    lost: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    digests: dict[str, bytes] = field(default_factory=dict)
    step: tuple[Reduced, Frame] | None = None

    def hear(self, name: str, answer: Reduced, data: Frame | None) -> None:
        """Take a node's answer.

        Raises:
            RemoteProtocolError: it was not asked, or has answered.
        """
        place = (self.commit.round, self.commit.attempt)
        if name not in self.waiting or (answer.round, answer.attempt) != place:
            raise RemoteProtocolError("an answer to no reduce")
        self.waiting.discard(name)
        if answer.digest is None:
            self.faults[name] = answer.fault or "no digest"
            return
        self.digests[name] = answer.digest
        if data is not None:
            self.step = answer, data

    def lose(self, name: str, reason: str) -> None:
        """A node is gone; one that has answered was not needed any more."""
        if name in self.waiting:
            self.waiting.discard(name)
            self.lost[name] = reason

    def is_over(self, now: float) -> bool:
        """Whether there is nothing to wait for."""
        return not self.waiting or now >= self.closes_at

    @property
    def fault(self) -> str | None:
        """Why it came to nothing, in one line; None if it has not."""
        for name, why in self.lost.items():
            return f"node {name} was lost in the all-reduce: {why}"
        for name in sorted(self.waiting):
            return f"node {name} did not end its all-reduce in time"
        for name, why in self.faults.items():
            return f"the all-reduce failed at node {name}: {why}"
        if len(set(self.digests.values())) > 1:
            return f"the nodes' results differ: {', '.join(sorted(self.digests))}"
        return None if self.step else "no node brought the result"


def orders(
    commit: Commit,
    examples: Mapping[int, int],
    hosts: Mapping[int, Member],
    version: int,
    seconds: float,
) -> dict[str, Reduce]:
    """What each node is asked, by name; ranks are by the lowest client.

    Args:
        commit: whose updates count.
        examples: of each of these clients.
        hosts: where they are.
        version: of the parameters.
        seconds: for how long a node waits for another.
    """
    members: dict[str, list[int]] = {}
    for client in sorted(examples):
        members.setdefault(hosts[client].name, []).append(client)
    meetings = [hosts[clients[0]].meeting for clients in members.values()]
    return {
        name: Reduce(
            round=commit.round,
            attempt=commit.attempt,
            version=version,
            clients=tuple(clients),
            examples=sum(examples.values()),
            rank=rank,
            ranks=len(members),
            address=meetings[rank].address,
            meeting=meetings[0],
            seconds=seconds,
        )
        for rank, (name, clients) in enumerate(members.items())
    }
