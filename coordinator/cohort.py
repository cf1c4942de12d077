"""Who is asked in a round, who is still waited for, and until when.

Pure questions about a state; what follows from the answers is in ``rounds``.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

from coordinator.deadline import times
from coordinator.events import Client
from coordinator.state import Policy, State, Training
from protocol import noise


def draw(
    policy: Policy,
    round: int,
    attempt: int,
    busy: Collection[Client] = (),
    places: int | None = None,
) -> tuple[Client, ...]:
    """The cohort: a function of (seed, round, attempt), whoever is online.

    Where late updates count, those who are busy with an earlier task are passed over, and
    only ``places`` are free.
    """
    key = noise.key("cohort", policy.seed, round, attempt)
    order = noise.permutation(key, policy.clients)
    places = policy.cohort if places is None else places
    if not busy:
        return tuple(int(c) for c in order[:places])
    return tuple(islice((int(c) for c in order if c not in busy), places))


def waited_for(state: State, phase: Training, policy: Policy, now: float) -> list[Client]:
    """Clients of the open round that may still answer."""
    hosted = state.hosted
    return [
        client
        for client in dict.fromkeys((*phase.cohort, *state.out))
        if client not in phase.refs
        and client not in phase.failed
        and (client in hosted or now < gone_at(state, client, policy))
    ]


def wake_at(state: State, policy: Policy, after: float) -> float | None:
    """When a Tick is next due for an open round to close; otherwise now and then will do.

    ``after`` is when the last event was: what was due by then has been done.
    """
    match state.phase:
        case Training() as phase:
            hosted = state.hosted
            asked = (*phase.cohort, *state.out)
            away = [c for c in asked if c not in hosted and c in state.lost]
            gone = [gone_at(state, c, policy) for c in away if c not in phase.refs]
            return min([phase.closes_at, *(at for at in gone if at > after)])
        case _:
            return None


def gone_at(state: State, client: Client, policy: Policy) -> float:
    """When a client that is not hosted stops being waited for."""
    lost = state.lost.get(client)
    return lost[0] + policy.return_seconds if lost else float("-inf")


def absence(state: State, client: Client) -> str:
    """Why nothing came of a client that did not fail."""
    if client in state.lost:
        return state.lost[client][1]
    return "no answer" if client in state.hosted else "no node hosts it"


def task_times(state: State, phase: Training, cut_at: float | None) -> list[float]:
    """What the tasks of a round took, node by node; of one that is gone nothing is known."""
    return [
        seconds
        for _, clients in sorted(state.members.items())
        for seconds in times(
            [c for c in clients if c in phase.cohort and c not in phase.failed],
            phase.arrived,
            phase.opened_at,
            cut_at,
        )
    ]
