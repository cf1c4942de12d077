"""A job that all ranks do together: what rank 0 sends, and what each reports of it.

An order is a message of our own wire protocol, as the coordinator sends it, with what it
carries in frames of their own, whatever their size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

import msgspec
import numpy as np

from node.engine import Outcome
from node.ranks import GroupError, RankError
from node.worker import Worker
from protocol.channel import to_node
from protocol.messages import Carrier, Failed, Ready, ToNode, Update
from protocol.parts import Cost, Phase
from protocol.payload import Flat
from protocol.wire import Frame

if TYPE_CHECKING:
    from node.group import Group  # loads torch

Order = tuple[ToNode, Frame | None, Flat | None]
PHASES: tuple[Phase, ...] = get_args(Phase)
PEAKS = ("rss", "cuda", "reserved")


def send(
    group: Group, message: ToNode, data: Frame | None = None, memory: Flat | None = None
) -> None:
    """To all followers.

    Args:
        group: of which this is rank 0.
        message: the order.
        data: its payload.
        memory: of a task's client.

    Raises:
        GroupError: a rank is gone.
    """
    plain = message
    if isinstance(message, Carrier) and message.payload is not None:
        plain = msgspec.structs.replace(message, blob=0)  # the data come beside it
    version, *body = to_node.pack(plain)
    held = None if memory is None else memoryview(memory.tobytes())
    group.send(version, body[0] if body else None, data, held)  # a beat has no body


def receive(group: Group) -> Order:
    """The next order: a message, its payload, and what a task's client remembers.

    Raises:
        GroupError: rank 0 is gone.
    """
    version, body, data, memory = group.receive()
    message, _ = to_node.unpack([bytes(frame) for frame in (version, body) if frame is not None])
    held = None if memory is None else np.frombuffer(memory, np.float32)
    return message, None if data is None else memoryview(data), held


def end(group: Group, worker: Worker, outcome: Outcome | None) -> list[list[float]]:
    """Leave a job together; each rank's memory peaks, by rank.

    Raises:
        RankError: another rank failed where none asked another anything any more.
        GroupError: a rank is gone, or holds other parameters.
    """
    message = None if outcome is None else outcome.message
    held = worker.statement()
    replica = [float(held.version), float(int.from_bytes(held.digest[:6], "big"))]
    costs = message.costs if isinstance(message, Update | Ready) else ()
    error = RankError(message.reason) if isinstance(message, Failed) else None
    try:
        rows = group.end([*replica, *peaks(costs)], error)
    except RankError as told:
        if told is error:
            return []
        raise
    if any(row[:2] != replica for row in rows):
        group.is_broken = True
        raise GroupError("a rank holds other parameters")
    return [row[2:] for row in rows]


def peaks(costs: Sequence[Cost]) -> list[float]:
    """The highest peaks of each phase, PEAKS within PHASES; NaN where unknown."""
    out = []
    for phase in PHASES:
        of = [cost for cost in costs if cost.phase == phase]
        for name in PEAKS:
            known = [float(v) for cost in of if (v := getattr(cost, name)) is not None]
            out.append(max(known) if known else math.nan)
    return out


def with_others(outcome: Outcome, others: Sequence[Sequence[float]]) -> Outcome:
    """Rank 0's costs with the peaks of all other ranks on top; unknown as soon as one's is."""
    message = outcome.message
    if not others or not isinstance(message, Update | Ready):
        return outcome

    def summed(cost: Cost, name: str) -> int | None:
        own = getattr(cost, name)
        at = PHASES.index(cost.phase) * len(PEAKS) + PEAKS.index(name)
        total = math.nan if own is None else own + sum(row[at] for row in others)
        return None if math.isnan(total) else int(total)

    costs = tuple(
        msgspec.structs.replace(cost, **{name: summed(cost, name) for name in PEAKS})
        for cost in message.costs
    )
    return replace(outcome, message=msgspec.structs.replace(message, costs=costs))
