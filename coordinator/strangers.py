"""What those may do who are not logged in, and who may not log in for now."""

from __future__ import annotations

from collections.abc import Callable

from coordinator import limits
from coordinator.limits import BARRED_SECONDS, MAX_HELLO_BYTES, MAX_STRANGERS, Bucket, Recent
from protocol.messages import Refuse
from protocol.wire import Peer, RemoteProtocolError


class Strangers:
    """Everybody at the door; of those who are too many the oldest are forgotten.

    Args:
        now: a monotonic clock.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._said = Recent[Peer, Bucket](limits.stranger, MAX_STRANGERS)
        self._logins = Recent[str, Bucket](limits.login, MAX_STRANGERS)
        self._barred: dict[str, tuple[float, str]] = {}  # key or name -> until when, and why

    def exceeded(self, peer: Peer, nbytes: int) -> str | None:
        """Account for a message; says which limit it is beyond: they have to be few and small."""
        if not self._said[peer].take(self._now()):
            return "a connection that is not logged in says too much"
        return "too large for a login" if nbytes > MAX_HELLO_BYTES else None

    def refusal(self, who: str, node: str) -> Refuse | None:
        """Account for a login; says why it cannot be just now, or None.

        Raises:
            RemoteProtocolError: there were too many of them to be answered.
        """
        now = self._now()
        until, why = self._barred.get(who, (now, ""))
        if until > now:
            reason = f"barred for another {until - now:.0f} s: {why}"
            return Refuse(code="breach", reason=reason)
        if not self._logins[who].take(now):
            raise RemoteProtocolError(f"node {node} logs in too often")
        return None

    def bar(self, who: str, why: str) -> None:
        """Turn somebody away for a while, by key or name."""
        now = self._now()
        barred = [(name, kept) for name, kept in self._barred.items() if kept[0] > now]
        self._barred = dict(barred[-MAX_STRANGERS:])
        self._barred[who] = (now + BARRED_SECONDS, why)
