"""The bytes of each round, by node: our own count held against the kernel's.

Both look at the same connections, so what lies between them can only be on its way: sent by us
and not yet by the kernel (down), or received by the kernel and not yet by us (up).  That is gone
at some later look.  What each of three looks in a row has found is there to stay, and nothing
explains it: a message that was not counted, or counted wrong.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, get_args

from protocol.meter import Gap, Meter, Way
from protocol.tcp import Traffic

MOST = 0.01  # of a round's bytes that may be unexplained
LOOKS = 3  # that must agree: a beat may be on its way at any

K = TypeVar("K")


@dataclass
class Unexplained:
    """What the kernel has moved otherwise than we have counted, of one node and direction.

    Attributes:
        first: the first round in which it was more than a hundredth.
        rounds: in how many.
        bytes: in those; positive where we count more.
    """

    first: int
    rounds: int = 0
    bytes: int = 0


class Excess(NamedTuple):
    """More than ``MOST`` of a round's bytes are unexplained."""

    node: str
    way: Way
    unexplained: int  # bytes
    kernel: int  # bytes


@dataclass
class _Looks:
    """At one node and direction.

    Attributes:
        gaps: bytes that may have been on their way at the last looks.
        settled: those that all of them have found; None where they were too few to say.
    """

    gaps: deque[int] = field(default_factory=lambda: deque([0] * LOOKS, LOOKS))
    settled: int | None = 0

    def take(self, gap: int) -> int | None:
        """The unexplained bytes that this look confirms; None where too few came before it."""
        self.gaps.append(gap)
        if len(self.gaps) < LOOKS:
            return None
        past, self.settled = self.settled, min(self.gaps)
        return None if past is None else self.settled - past


def _anew() -> _Looks:
    """At a connection whose beginning was not seen, or not only at one."""
    return _Looks(deque(maxlen=LOOKS), None)


class Reconciler:
    """Knows the counts as of the last round.

    Args:
        meter: of the run; what it has counted so far belongs to no round to come.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._looks: dict[tuple[str, Way], _Looks] = {}
        self._found: dict[tuple[str, Way], int | None] = {}  # unexplained, at the last look
        self._remember()
        for key in meter.message:  # of a run that is resumed: its connections are gone
            self._looks[key.node, key.way] = _anew()

    def look(self, idle: Collection[str], is_drained: bool = True) -> None:
        """All answers of a round are in, and the kernel's counts have just been taken.

        Args:
            idle: nodes that have answered all they were asked, so that nothing is on its way
                but a beat; others are looked at in a later round.
            is_drained: no message waits to be received; otherwise one may be any node's.
        """
        self._found = {
            (node, way): self._look(node, way, gap, is_drained or way == "down")
            for (node, way), gap in self._meter.gaps().items()
            if node in idle
        }
        self._meter.moved -= set(idle)

    def close(self, hidden: Collection[str]) -> tuple[dict[str, Any], int, list[Excess]]:
        """A round is over: its bytes, how many counts were compared, and which do not fit.

        Args:
            hidden: nodes that are not listed.
        """
        compared, excesses = 0, []
        table = self._grown(hidden)
        for node, way in self._meter.gaps():
            if node in hidden:
                continue
            side = table.setdefault(node, {}).setdefault(way, {})
            side["tcp"] = moved = self._moved(node, way)
            if way == "down":
                side["resent"] = self._resent(node)
            side["unexplained"] = found = self._found.get((node, way))
            compared += found is not None
            if found is not None and abs(found) > MOST * moved:
                excesses.append(Excess(node, way, found, moved))
        self._remember()
        return table, compared, excesses

    def forget(self, node: str) -> None:
        """Of a node that has long been gone."""
        for way in get_args(Way):
            self._looks.pop((node, way), None)

    def _look(self, node: str, way: Way, gap: Gap, is_drained: bool) -> int | None:
        """The unexplained bytes; positive where we count more than the kernel."""
        if node in self._meter.moved:  # what was lost with a connection is no mistake
            self._looks[node, way] = _anew()
        sign = 1 if way == "down" else -1
        looks, on_way = (
            self._looks.setdefault((node, way), _Looks()),
            sign * (gap.ours - gap.kernel),
        )
        if not is_drained and (looks.settled is None or on_way > looks.settled):
            return None  # it may be what waits
        found = looks.take(on_way)
        return None if found is None else sign * found

    def _grown(self, hidden: Collection[str]) -> dict[str, Any]:
        """What was added to our own counts, by node and direction."""
        table: dict[str, Any] = {}
        for level, counter, past in (
            ("payload", self._meter.payload, self._payload),
            ("message", self._meter.message, self._message),
        ):
            for key, nbytes in _more(counter, past).items():
                if key.node not in hidden:
                    side = table.setdefault(key.node, {}).setdefault(key.way, {})
                    side.setdefault(level, {})[key.kind] = nbytes
        for around, nbytes in _more(self._meter.around, self._around).items():
            if around.node not in hidden:
                table[around.node][around.way][around.layer] = nbytes
        return table

    def _moved(self, node: str, way: Way) -> int:
        now, past = self._meter.traffic[node], self._traffic.get(node, Traffic())
        return now.received - past.received if way == "up" else now.sent - past.sent

    def _resent(self, node: str) -> int | None:
        now, past = self._meter.traffic[node], self._traffic.get(node, Traffic())
        return None if now.resent is None or past.resent is None else now.resent - past.resent

    def _remember(self) -> None:
        self._payload, self._message = self._meter.payload.copy(), self._meter.message.copy()
        self._around, self._traffic = self._meter.around.copy(), dict(self._meter.traffic)
        self._found = {}


def _more(counter: Counter[K], past: Counter[K]) -> dict[K, int]:
    return {key: n - past[key] for key, n in counter.items() if n != past[key]}
