"""What a node lets a round take, and what that makes of a plan.

Bytes are of payload: the method's own numbers, a step down and each client's update up.
Messages around them are not in it, nor is the first copy of the parameters.  Time is in
inferences, of which the node has measured one before the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

ENDLESS = 1 << 62  # bytes: no limit
MANY = 1e12  # passes: more is no other limit, nor an infinite number


@dataclass(frozen=True, slots=True)
class Limit:
    """Of the node that hosts a client, for all that it hosts together.

    Attributes:
        nbytes: of payload in one round, both ways.
        clients: how many it hosts; each may be asked in the same round.
        passes: inferences of a mini-batch that a task has time for; None is no limit.
    """

    nbytes: int = ENDLESS
    clients: int = 1
    passes: float | None = None

    def update_bytes(self, down: int) -> int:
        """What is left for each client's update beside a step of so many bytes."""
        return max(0, self.nbytes - down) // self.clients


@dataclass(frozen=True, slots=True)
class Takes:
    """Bytes at the most: of a step, and of the smallest update that can be asked for."""

    down: int
    up: int

    def fits(self, limit: Limit) -> bool:
        return self.down + limit.clients * self.up <= limit.nbytes


TakesOf = Callable[[int], Takes]  # by tier


def lowered(tier: int, takes: TakesOf, limit: Limit | None) -> int:
    """The tier itself, or the highest below it that a node of this limit can be of."""
    if limit is None:
        return tier
    return next((t for t in range(tier, 0, -1) if takes(t).fits(limit)), 0)


def shortage(takes: TakesOf | None, limit: Limit) -> str | None:
    """Why no plan can keep within a limit, or None; what is not known does not matter."""
    if takes is None or (least := takes(0)).fits(limit):
        return None
    return (
        f"a round takes {least.down} bytes of payload down and {least.up} up for each client, "
        f"at the least; {limit.nbytes} are too few for {limit.clients} clients"
    )
