"""What is wrong with what a node has sent, if anything: judged by values alone, no I/O."""

from __future__ import annotations

from typing import Any

from coordinator.roster import Member
from fedalgos.limits import shortage
from fedalgos.method import Assignment, Contribution, Method, Settings
from fedalgos.space import ParamSpace
from protocol import payload
from protocol.experiment import Data
from protocol.messages import Ready, Refuse, Update
from protocol.payload import Flat
from protocol.wire import Frame, RemoteProtocolError


def contribution(
    update: Update,
    data: Frame | None,
    assignment: Assignment,
    method: Method[Any],
    most_examples: int,
) -> Contribution | str:
    """What an update contributes, or why it is of no use.

    Args:
        update: as it was sent.
        data: its payload's buffer.
        assignment: what it is the answer to.
        method: of the run.
        most_examples: that a task can have, see ``most_examples``.
    """
    if update.payload is None or data is None:
        return "no payload"
    if (why := _miscount(update.examples, most_examples)) is not None:
        return why
    try:
        value = payload.decode(update.payload, data)
    except RemoteProtocolError as error:
        return str(error)
    accepts = method.collective.accepts if method.collective else method.accepts
    why = accepts(assignment, value)
    return why or Contribution(assignment, update.examples, value, update.loss)


def most_examples(o: Settings, data: Data) -> int:
    """How many examples a task can have; 0 where only the nodes know.

    A task of no number of steps is one pass over a client's examples, which are some of
    ``data.train``.
    """
    return o.steps * o.batch_size if o.steps else data.train


def _miscount(examples: int, most: int) -> str | None:
    """Why the examples cannot have been so many, where it is known how many there are."""
    if examples < 1:
        return "no examples"
    return f"examples: {examples} of at most {most}" if most and examples > most else None


def start(ready: Ready, data: Frame | None) -> tuple[ParamSpace, Flat]:
    """The parameter space and its initial values, as an evaluator brings them.

    Raises:
        RemoteProtocolError: it brings none, or they do not fit each other.
    """
    if not ready.tensors or ready.payload is None or data is None:
        raise RemoteProtocolError("the evaluator sent no parameters")
    try:
        space = ParamSpace.of(ready.tensors)
    except ValueError as error:
        raise RemoteProtocolError(f"the evaluator's parameters: {error}") from error
    x = payload.decode(ready.payload, data).values.copy()
    if len(x) != space.size or space.digest != ready.space:
        raise RemoteProtocolError("the evaluator's parameters do not fit its space")
    return space, x


def misfit(member: Member, space: ParamSpace, method: Method[Any]) -> Refuse | None:
    """Why a node cannot take part in this run, once its parameters are known."""
    if member.space not in (b"", space.digest):
        reason = f"node {member.name} trains other tensors than the evaluator"
        return Refuse(code="version", reason=reason)
    why = member.limit and shortage(method.takes, member.limit)
    return Refuse(code="limits", reason=f"node {member.name}: {why}") if why else None
