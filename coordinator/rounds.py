"""The round machine: everything the coordinator decides, and no I/O.

    Gathering --enough clients--> Training --all in, or deadline--> Committing --+
      ^   ^                          |  below quorum                             |
      |   +--------------------------+                                           |
      +------------- Evaluating <---------------- evaluation due ----------------+

Rule 1: every transition lives in this file.  Rule 2: this file imports no clock,
socket or logger; time arrives as ``event.now`` and leaves through ``cohort.wake_at``.
Rule 3: tensors never enter; events carry a ``ref`` to a stored update.  What the machine
knows is ``state``; the shell (``server``) turns frames into events and runs commands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coordinator.budget import unseen, used_up
from coordinator.cohort import absence, draw, task_times, waited_for
from coordinator.deadline import remember
from coordinator.events import (
    Abandon,
    Assign,
    Client,
    Command,
    Commit,
    CommitFailed,
    Committed,
    Discard,
    Evaluate,
    EvaluatorLost,
    EvaluatorReady,
    Event,
    Finish,
    NodeLost,
    NodeReady,
    Resumed,
    Scored,
    TaskFailed,
    UpdateArrived,
)
from coordinator.state import (
    Committing,
    Evaluating,
    Finished,
    Gathering,
    Policy,
    State,
    Training,
)

MAX_DRAWS = 1000  # cohorts tried at once for one that can be reached

Outcome = tuple[State, Sequence[Command]]


def step(state: State, event: Event, policy: Policy) -> Outcome:
    """Next state and the commands it calls for.  Total: no event is an error."""
    state = _membership(state, event)
    if isinstance(event, NodeReady):  # whoever has lost a task in a restart does it again
        state, commands = _phase(state, event, policy)
        late = [(c, state.out[c]) for c in event.clients if c in state.out]
        return state, [*(Assign(*place, (), (c,)) for c, place in late), *commands]
    return _phase(state, event, policy)


def _phase(state: State, event: Event, policy: Policy) -> Outcome:
    match state.phase:
        case Gathering():
            state, said = _between(state, event, "no round is open")
            state, commands = _advance(state, event.now, policy)
            return state, [*said, *commands]
        case Training() as phase:
            return _training(state, phase, event, policy)
        case Committing(commit):
            return _committing(state, commit, event, policy)
        case Evaluating():
            return _evaluating(state, event, policy)
        case Finished():
            return state, _reject(event, "the run is over")


def _between(state: State, event: Event, reason: str) -> Outcome:
    """No round is open: an earlier task's update is kept for the next, any other refused."""
    match event:
        case UpdateArrived(client=c) if state.out.get(c) == (event.round, event.attempt):
            if event.fault is not None:
                return _returned(state, c), _reject(event, event.fault)
            early = {**state.early, c: (event.round, event.ref)}
            return replace(_returned(state, c), early=early), []
        case TaskFailed(client=c) if state.out.get(c) == (event.round, event.attempt):
            return _returned(state, c), []
        case _:
            return state, _reject(event, reason)


def _returned(state: State, client: Client) -> State:
    """A client's earlier task has come to its end."""
    return replace(state, out={c: place for c, place in state.out.items() if c != client})


def _membership(state: State, event: Event) -> State:
    match event:
        case NodeReady():
            lost = {c: why for c, why in state.lost.items() if c not in event.clients}
            members = {**state.members, event.node: event.clients}
            limits = {c: limit for c, limit in state.limits.items() if c not in event.clients}
            if event.limit is not None:
                limits |= dict.fromkeys(event.clients, event.limit)
            return replace(state, members=members, limits=limits, lost=lost)
        case NodeLost():
            gone = state.members.get(event.node, ())
            members = {n: cs for n, cs in state.members.items() if n != event.node}
            why = (event.now, f"node {event.node} lost: {event.reason}")
            return replace(state, members=members, lost={**state.lost, **dict.fromkeys(gone, why)})
        case EvaluatorReady() | EvaluatorLost():
            return replace(state, evaluator=isinstance(event, EvaluatorReady))
        case Resumed(now=now):
            for node in state.members:
                state = _membership(state, NodeLost(now, node, "the coordinator restarted"))
            phase = Gathering(now) if isinstance(state.phase, Gathering) else state.phase
            return replace(state, evaluator=False, phase=phase, out={})  # whose plans are lost
        case _:
            return state


def _advance(state: State, now: float, policy: Policy) -> Outcome:
    """Between rounds: evaluate, open the next round, finish, or wait."""
    done = state.round
    is_last = state.is_last(policy)
    due = done == 0 or is_last or done % policy.evaluate_every == 0
    since = state.phase.since if isinstance(state.phase, Gathering) else now
    waiting = replace(state, phase=Gathering(since))
    if state.round == 0 and state.attempt == 0 and len(state.hosted) < policy.start_clients:
        return waiting, []
    if due and state.scored < done:
        if not state.evaluator:
            return waiting, []
        return replace(state, phase=Evaluating()), [Evaluate(done, is_last)]
    if is_last:
        return _finish(state, None)
    return _open(waiting, since, now, policy)


def _open(state: State, since: float, now: float, policy: Policy) -> Outcome:
    """Open the next round with a cohort of which a quorum can be reached."""
    state, stale = _expire(state, policy)
    hosted, number = state.hosted, state.round + 1
    if len(hosted) < policy.quorum:
        return state, stale
    there = [c for c in state.out if c in hosted]
    places, busy = max(0, policy.cohort - len(there)), {*state.out, *state.early}
    for attempt in range(state.attempt, state.attempt + MAX_DRAWS):
        cohort = draw(policy, number, attempt, busy, places)
        present = tuple(c for c in cohort if c in hosted)
        if len(present) + len(there) + len(state.early) >= policy.quorum:
            asked = [len(set(cs).intersection(cohort)) for cs in state.members.values()]
            seconds = policy.deadline.seconds(state.seen, max(asked), state.failures)
            phase = Training(
                cohort,
                now,
                now + seconds,
                refs={c: ref for c, (_, ref) in state.early.items()},
                stale={c: number - t for c, (t, _) in state.early.items() if t != number},
                limits={c: state.limits[c] for c in cohort if c in state.limits},
            )
            assign = Assign(number, attempt, cohort, present, phase.limits)
            opened = replace(state, attempt=attempt, early={}, phase=phase)
            opened, closing = _close(opened, phase, now, policy) if phase.refs else (opened, [])
            return opened, [*stale, assign, *closing]
        if now < since + policy.return_seconds:
            return state, stale  # the drawn clients may come back
    return replace(state, attempt=state.attempt + MAX_DRAWS, phase=Gathering(now)), stale


def _expire(state: State, policy: Policy) -> Outcome:
    """Give up earlier tasks that are too stale for the round about to open."""
    oldest = state.round + 1 - policy.max_staleness
    out = {c: place for c, place in state.out.items() if place[0] >= oldest}
    early = {c: kept for c, kept in state.early.items() if kept[0] >= oldest}
    commands = [
        Discard(ref, c, task, 0, f"stale: round {task}, now {state.round + 1}")
        for c, (task, ref) in state.early.items()
        if c not in early
    ]
    return replace(state, out=out, early=early), commands


def _training(state: State, phase: Training, event: Event, policy: Policy) -> Outcome:
    commands: list[Command] = []
    number = state.round + 1
    match event:
        case UpdateArrived():
            if (why := _refusal(state, phase, event, policy)) is not None:
                commands += _reject(event, why)
            else:
                refs = {**phase.refs, event.client: event.ref}
                arrived = {**phase.arrived, event.client: event.now}
                late = {event.client: number - event.round} if event.round != number else {}
                phase = replace(phase, refs=refs, arrived=arrived, stale={**phase.stale, **late})
            if state.out.get(event.client) == (event.round, event.attempt):
                state = _returned(state, event.client)
            elif event.fault is not None and why == event.fault:
                phase = replace(phase, failed={**phase.failed, event.client: event.fault})
        case TaskFailed():
            current = (event.round, event.attempt) == (number, state.attempt)
            if current and event.client in phase.cohort and event.client not in phase.refs:
                phase = replace(phase, failed={**phase.failed, event.client: event.reason})
            elif state.out.get(event.client) == (event.round, event.attempt):
                state = _returned(state, event.client)
        case NodeReady():
            again = tuple(
                c
                for c in phase.cohort
                if c in event.clients and c not in phase.refs and c not in phase.failed
            )
            if again and event.now < phase.closes_at:
                commands.append(Assign(number, state.attempt, phase.cohort, again, phase.limits))
        case _:
            pass
    state, closing = _close(replace(state, phase=phase), phase, event.now, policy)
    return state, [*commands, *closing]


def _refusal(state: State, phase: Training, event: UpdateArrived, policy: Policy) -> str | None:
    """Why the update does not count in the open round, or None."""
    if state.out.get(event.client) == (event.round, event.attempt):
        return event.fault
    if event.round != state.round + 1:
        return f"stale: round {event.round}, now {state.round + 1}"
    if event.attempt != state.attempt:
        return f"stale: attempt {event.attempt}, now {state.attempt}"
    if event.client not in phase.cohort:
        return "not in the cohort"
    if event.client in phase.refs:
        return "duplicate"
    if event.now >= phase.closes_at and not policy.max_staleness:
        return "after the deadline"
    return event.fault


def _close(state: State, phase: Training, now: float, policy: Policy) -> Outcome:
    """Commit or abandon the open round if it is time; else go on waiting."""
    number, got = state.round + 1, len(phase.refs)
    late, pending = now >= phase.closes_at, waited_for(state, phase, policy, now)
    refs = tuple(sorted(phase.refs.items()))
    if got < policy.target and pending and not late:
        return state, []
    carried = dict.fromkeys(pending, "still training") if policy.max_staleness else {}
    missing = tuple(
        (c, phase.failed.get(c) or carried.get(c) or absence(state, c))
        for c in phase.cohort
        if c not in phase.refs
    )
    here = (number, state.attempt)
    state = replace(state, out={**{c: here for c in phase.cohort if c in carried}, **state.out})
    if got >= policy.quorum:
        stale = tuple(sorted(phase.stale.items()))
        commit = Commit(number, state.attempt, phase.cohort, refs, missing, stale)
        state = replace(
            state, seen=remember(state.seen, task_times(state, phase, now if late else None))
        )
        return replace(state, phase=Committing(commit)), [commit]
    what = "at the deadline" if late else "and nobody left to wait for"
    first = "".join(f"; client {client}: {why}" for client, why in missing[:1])
    reason = f"{got} of quorum {policy.quorum} {what}{first}"
    if policy.max_staleness:  # what has come still counts
        kept = {c: (number - phase.stale.get(c, 0), ref) for c, ref in refs}
        state, refs = replace(state, early=kept), ()
    return _abandon(state, refs, reason, now, policy)


def _abandon(
    state: State, refs: tuple[tuple[Client, str], ...], reason: str, now: float, policy: Policy
) -> Outcome:
    """Try the round again with the next attempt's cohort, a limited number of times."""
    number, failures = state.round + 1, state.failures + 1
    abandon = Abandon(number, state.attempt, refs, reason)
    if failures >= policy.max_attempts:
        why = f"round {number} failed {failures} times, last: {reason}"
        state, commands = _finish(state, why)
        return state, [abandon, *commands]
    again = replace(state, attempt=state.attempt + 1, failures=failures, phase=Gathering(now))
    state, commands = _advance(again, now, policy)
    return state, [abandon, *commands]


def _finish(state: State, why: str | None) -> Outcome:
    """The end of the run; what came too late for its last round counts nowhere."""
    late = [Discard(ref, c, task, 0, "the run is over") for c, (task, ref) in state.early.items()]
    return replace(state, early={}, out={}, phase=Finished(why)), [*late, Finish(why)]


def _committing(state: State, commit: Commit, event: Event, policy: Policy) -> Outcome:
    match event:
        case Resumed():
            return state, [commit]
        case Committed(round=number) if number == state.round + 1:
            return _committed(replace(state, round=number, attempt=0, failures=0), event, policy)
        case CommitFailed(now=now, round=number, reason=why) if number == state.round + 1:
            return _abandon(state, (), why, now, policy)  # its updates are gone already
        case _:
            return _between(state, event, "the round is closed")


def _committed(state: State, event: Committed, policy: Policy) -> Outcome:
    """A round is done; it was the last one if it has used up the budget."""
    if (why := unseen(policy.budget, event.spent)) is not None:
        return _finish(state, why)
    if state.round < policy.rounds:
        state = replace(state, ended=used_up(policy.budget, event.spent))
    return _advance(state, event.now, policy)


def _evaluating(state: State, event: Event, policy: Policy) -> Outcome:
    if isinstance(event, Scored) and event.round == state.round:
        return _advance(replace(state, scored=event.round), event.now, policy)
    if isinstance(event, EvaluatorReady):  # a new one: the old one's answer is lost
        return state, [Evaluate(state.round, state.is_last(policy))]
    return _between(state, event, "no round is open")


def _reject(event: Event, reason: str) -> Sequence[Command]:
    if not isinstance(event, UpdateArrived):
        return []
    return [Discard(event.ref, event.client, event.round, event.attempt, reason)]
