"""The story of a run in words: its events, and what the round machine made of them.

Events are read from the journal, which is opened for reading only, also while the run goes
on; folding them through the machine again gives its commands, so nothing else need be kept.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from coordinator import eventlog, rounds
from coordinator import events as kinds
from coordinator.live import spans
from coordinator.policy import policy
from coordinator.state import State
from protocol import experiment as experiments
from protocol.errors import ExperimentError

Story = Iterator[tuple[float, str]]


def read(directory: Path) -> list[kinds.Event]:
    """All events of a run so far.

    Raises:
        ExperimentError: the directory has no journal, or none that can be read.
    """
    path = directory / "journal.sqlite"
    try:
        uri = f"{path.resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as db:
            query = "SELECT text FROM log WHERE kind = ? ORDER BY id"
            lines = [text for (text,) in db.execute(query, (eventlog.KIND,))]
        return [eventlog.decode(line) for line in lines]
    except (sqlite3.Error, msgspec.MsgspecError, KeyError) as error:
        raise ExperimentError(f"{path} cannot be read: {error}") from error


def tell(directory: Path) -> Story:
    """(seconds on the run's clock, sentence), in order."""
    plan = policy(experiments.load(directory / "experiment.toml", ()))
    state = State()
    for event in read(directory):
        if (said := _event(event)) is not None:
            yield event.now, said
        state, commands = rounds.step(state, event, plan)
        for command in commands:
            if (said := _command(command, state.ended)) is not None:
                yield event.now, said


def _event(event: kinds.Event) -> str | None:
    match event:
        case kinds.NodeReady(node=node, clients=clients):
            return f"node {node} is ready, with client{_s(clients)} {spans(list(clients))}"
        case kinds.NodeLost(node=node, reason=reason):
            return f"node {node} is lost: {reason}"
        case kinds.TaskFailed(client=client, round=number, reason=reason):
            return f"round {number}: client {client} failed: {reason}"
        case kinds.UpdateArrived(client=client, round=number, fault=None):
            return f"round {number}: the update of client {client} is here"
        case kinds.CommitFailed(round=number, reason=reason):
            return f"round {number} cannot be committed: {reason}"
        case kinds.EvaluatorReady():
            return "the evaluation worker is ready"
        case kinds.EvaluatorLost():
            return "the evaluation worker is lost"
        case kinds.Scored(round=number):
            return f"the parameters after round {number} are evaluated"
        case kinds.Resumed():
            return "the coordinator has come back"
        case _:
            return None


def _command(command: kinds.Command, ended: str | None) -> str | None:
    match command:
        case kinds.Assign(round=number, attempt=attempt, clients=clients):
            again = f", attempt {attempt + 1}" if attempt else ""
            return f"round {number}{again}: asking client{_s(clients)} {spans(list(clients))}"
        case kinds.Discard(round=number, client=client, reason=reason):
            return f"round {number}: the update of client {client} does not count: {reason}"
        case kinds.Commit(round=number, refs=refs, missing=missing):
            lacking = "; ".join(f"client {client} is missing: {why}" for client, why in missing)
            return f"round {number} is committed, {len(refs)} update{_s(refs)}" + (
                f"; {lacking}" if lacking else ""
            )
        case kinds.Abandon(round=number, reason=reason):
            return f"round {number} is given up: {reason}"
        case kinds.Finish(reason=reason):
            if reason:
                return f"the run has failed: {reason}"
            return ": ".join(filter(None, ("the run is complete", ended)))
        case _:
            return None


def _s(things: tuple[Any, ...]) -> str:
    return "" if len(things) == 1 else "s"


def clock(seconds: float) -> str:
    """3725.5 as "1:02:05.5"."""
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02}:{rest:04.1f}"
