"""Whose account each message goes to: its node's, also what it said before it was logged in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coordinator.limits import MAX_STRANGERS, Recent
from coordinator.roster import Member
from protocol.messages import Carrier, Chunk, Message, Pull
from protocol.meter import Key, Kind, Mechanism, Meter, Way, kind_of, payload_bytes
from protocol.wire import Frame, Peer


class Tally:
    """Counts what passes the desk.

    Args:
        mechanism: how the connections are secured.
        offered: the message that announced a blob of ours, while that is there.
        expected: the message that announced a blob which is on its way from a peer.

    Attributes:
        meter: of the nodes, by name.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        offered: Callable[[int], Carrier | None],
        expected: Callable[[Peer, int], Carrier | None],
    ) -> None:
        self.meter = Meter(mechanism)
        self._offered, self._expected = offered, expected
        # connections whose handshake is counted
        self._greeted = Recent[Peer, bool](bool, MAX_STRANGERS)
        # what was said on a connection while nobody was logged in on it: whose it is its next
        # login says, and the kernel counts a connection from its beginning
        self._unowned = Recent[Peer, Meter](lambda: Meter(mechanism), MAX_STRANGERS)

    def logged_in(self, peer: Peer, node: str) -> None:
        """What was said on this connection so far is this node's."""
        if peer not in self._greeted:
            self.meter.connected(node)
        self._greeted[peer]  # once more, so that it stays there
        self.meter.add(node, self._unowned.pop(peer))

    def came(
        self,
        peer: Peer,
        member: Member | None,
        frames: Sequence[Frame],
        message: Message | None = None,
        buffer: Frame | None = None,
    ) -> None:
        """Count what came in; without a message it was none."""
        kind: Kind = "control" if message is None else self._kind(peer, "up", message)
        nbytes = 0 if message is None else payload_bytes(message, buffer)
        name = "" if member is None else member.name
        self._account(peer, name).count(Key(name, "up", kind), frames, nbytes)

    def sent(
        self, member: Member, frames: Sequence[Frame], message: Message, buffer: Frame | None
    ) -> None:
        """Count what went to a node."""
        key = Key(member.name, "down", self._kind(member.peer, "down", message))
        self.meter.count(key, frames, payload_bytes(message, buffer))

    def refused(self, peer: Peer, node: str, frames: Sequence[Frame]) -> None:
        """Count a refusal; ``node`` is empty where nobody is logged in."""
        self._account(peer, node).count(Key(node, "down", "control"), frames, 0)

    def _account(self, peer: Peer, node: str) -> Meter:
        return self.meter if node else self._unowned[peer]

    def _kind(self, peer: Peer, way: Way, message: Message) -> Kind:
        """A chunk, and the pull that asked for it, count as what announced their blob."""
        if not isinstance(message, Chunk | Pull):
            return kind_of(message)
        is_ours = isinstance(message, Chunk) == (way == "down")
        found = self._offered(message.blob) if is_ours else self._expected(peer, message.blob)
        return "control" if found is None else kind_of(found)
