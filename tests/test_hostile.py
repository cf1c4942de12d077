"""Peers that break the protocol, in virtual time: refused, counted, turned away; others go on."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from coordinator import account, limits
from fedalgos.method import Assignment, Work
from protocol.blobs import CHUNK_BYTES
from protocol.channel import to_coordinator
from protocol.messages import Beat, Failed, Pull, Refuse, Reject, Score, Sync, Task
from protocol.wire import VERSION
from tests.oracles import Quadratic
from tests.test_server import AVG, LARGE, MEZO, Make, Peer, Run, Said, make, two_nodes

__all__ = ["make"]  # the fixture


def refusals(peer: Peer) -> list[str]:
    return [refusal.code for refusal in peer.told(Refuse)]


# --- what is held against a node, and what becomes of it -------------------------


def test_a_node_that_keeps_breaking_the_protocol_is_turned_away_and_the_run_goes_on(
    make: Make,
) -> None:
    run = make(rounds={"quorum": 2})
    a, b, _ = two_nodes(run)
    bad = Failed(round=1, attempt=0, client=3, reason="of another node's client")
    n = int(limits.BREACHES_AT_ONCE)
    a.answer = lambda task: [(bad, None)] * n
    summary = run.finish()
    assert summary["status"] == "completed"
    assert summary["rejected"]["too many bad messages"] == 1
    assert n < summary["rejected"]["bad message"] <= 2 * n
    assert a.told(Refuse)[0].code == "breach"
    assert refusals(b) == []


def test_a_few_breaches_are_forgiven(make: Make) -> None:
    run = make()
    a, _, _ = two_nodes(run)
    score = Score(version=0, loss=0.0, metric=1.0, examples=1)
    a.answer = lambda task: [(score, None)] * 3 + [a.update(task)]
    summary = run.finish()
    assert summary["rejected"] == {"bad message": 12}
    assert refusals(a) == []


def test_a_flood_of_well_formed_messages_is_too_much(make: Make) -> None:
    run = make(rounds={"quorum": 2})
    a, b, _ = two_nodes(run)
    n = int(limits.MESSAGES_AT_ONCE) + 1
    a.answer = lambda task: []
    run.until(lambda: bool(a.told(Task)))
    beat = to_coordinator.pack(Beat())
    run.net.deliveries[:0] = [(run.net.now, a.peer, list(beat)) for _ in range(n)]
    summary = run.finish()
    assert summary["rejected"]["too many messages"] == 1
    assert refusals(a)[0] == "breach"
    assert refusals(b) == []
    assert summary["status"] == "completed"


def test_who_was_turned_away_is_barred_for_a_while_and_then_let_in(make: Make) -> None:
    run = make(rounds={"count": 1, "deadline_seconds": 1000.0})
    _, b, _ = two_nodes(run)
    b.answer = lambda task: []
    run.until(lambda: run.server.central is not None and bool(b.told(Task)))
    (member,) = [m for m in run.server.desk.roster if m.name == "a"]
    run.server._expel(member, "too many messages")
    again = Peer(run, "a", 0, 1, peer=b"another").login(run.net.now + 1)
    run.until(lambda: bool(again.heard))
    (refusal,) = again.told(Refuse)
    assert (refusal.code, "barred for another 59 s" in refusal.reason) == ("breach", True)
    later = Peer(run, "a", 0, 1, peer=b"later").login(run.net.now + limits.BARRED_SECONDS)
    run.until(lambda: bool(later.told(Task)))
    assert refusals(later) == []


def test_a_stranger_is_refused_a_few_times_and_then_not_even_read(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make()
    run.net.deliveries += [
        (0.0, b"stranger", list(to_coordinator.pack(Beat()))) for _ in range(500)
    ]
    read = []
    unpack = to_coordinator.unpack

    def counted(frames: list[bytes]) -> Any:
        read.append(frames)
        return unpack(frames)

    monkeypatch.setattr(to_coordinator, "unpack", counted)
    for _ in range(500):
        run.server.turn(0.0)
    assert len(read) == limits.STRANGER_AT_ONCE
    assert len(run.net.sent) == limits.STRANGER_AT_ONCE
    assert run.recorder.account.num_rejected["bad message"] == 500 - limits.STRANGER_AT_ONCE


def test_a_flood_of_nonsense_is_gone_through_many_messages_a_turn(make: Make) -> None:
    run = make()
    run.net.deliveries += [(0.0, b"%d" % i, [b"nonsense"]) for i in range(500)]
    for _ in range(500 // limits.VAIN_AT_A_TIME + 1):
        run.server.turn(0.0)
    assert run.recorder.account.num_rejected == {"bad message": 500}


def test_names_that_come_and_go_are_forgotten_one_by_one_and_their_bytes_are_not(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(account, "MAX_GONE", 3)
    run = make()
    two_nodes(run)
    run.until(lambda: run.server.central is not None)
    (b,) = (m for m in run.server.desk.roster if m.name == "b")
    run.server._part(b, "for now")
    for i in range(20):
        before = sum(run.recorder.meter.message.values())
        passing = Peer(run, f"passing-{i}", 2, peer=b"passing-%d" % i).login(run.net.now)
        run.until(lambda p=passing: bool(p.heard))  # type: ignore[misc]
        (member,) = (m for m in run.server.desk.roster if m.name == passing.name)
        run.until(lambda m=member: m.version is not None)  # type: ignore[misc]
        run.server._part(member, "it said goodbye")
        assert sum(run.recorder.meter.message.values()) > before
    nodes = run.recorder.account.nodes
    assert list(nodes)[-3:] == ["passing-17", "passing-18", "passing-19"]
    assert len(nodes) <= 2 + 3 + 1  # who is here, who was, and the last to come
    named = {key.node for key in run.recorder.meter.message}
    assert named <= {*nodes, "(others)"}
    assert set(run.server._hellos) <= set(nodes)
    assert set(run.server.desk.roster._probes) <= {*nodes, "evaluator"}


def test_reasons_that_quote_what_a_peer_made_up_do_not_fill_the_account(make: Make) -> None:
    run = make()
    for i in range(200):
        run.recorder.rejected(f"a value of {i}")
    counts = run.recorder.account.num_rejected
    assert (len(counts), sum(counts.values())) == (limits.MAX_REASONS + 1, 200)


def test_what_is_too_large_for_a_login_is_not_read_from_a_stranger(make: Make) -> None:
    run = make()
    body = b"\x00" * (limits.MAX_HELLO_BYTES + 1)
    run.net.deliver(0.0, b"stranger", [bytes([VERSION]), body])
    run.server.turn(0.0)
    assert run.net.sent == []
    assert run.recorder.account.num_rejected == {"bad message": 1}


def test_a_name_that_logs_in_all_the_time_is_not_answered(make: Make) -> None:
    run = make()
    for i in range(50):
        Peer(run, "a", 0, 1, peer=b"%d" % i).login(login=i)
    for _ in range(50):
        run.server.turn(0.0)
    assert run.recorder.account.num_rejected["bad message"] == 50 - limits.LOGINS_AT_ONCE


# --- replayed, reordered, made up ------------------------------------------------


@pytest.mark.parametrize("said", ["ready", "sync", "update", "failed"])
def test_a_message_said_twice_has_no_second_effect(make: Make, said: str) -> None:
    def answer(task: Task) -> list[Said]:
        update = a.update(task)
        place = {"round": task.round, "attempt": task.attempt, "client": task.client}
        again: dict[str, list[Said]] = {
            "ready": [a.ready(), update],
            "sync": [
                update,
                (Sync(version=0, reason="x"), None),
                (Sync(version=0, reason="x"), None),
            ],
            "update": [update, update],
            "failed": [update, (Failed(**place, reason="x"), None)],
        }
        return again[said]

    run = make(rounds={"count": 2})
    a, _, _ = two_nodes(run)
    a.answer = answer
    summary = run.finish()
    quiet = make()
    two_nodes(quiet)
    assert summary["digest"] == quiet.finish()["digest"]
    if said == "update":
        assert summary["rejected"]["duplicate"] + summary["rejected"].get("stale", 0) >= 2


def test_more_answers_than_tasks_are_a_breach(make: Make) -> None:
    run = make(rounds={"quorum": 2})
    a, _, _ = two_nodes(run)
    a.answer = lambda task: [a.update(task)] * 40
    summary = run.finish()
    assert summary["rejected"]["bad message"] > 0
    assert summary["rejected"]["too many bad messages"] == 1
    assert summary["status"] == "completed"


def test_an_answer_before_it_was_ready_is_a_breach(make: Make) -> None:
    run = make()
    a = Peer(run, "a", 0, 1)
    a.ready = lambda: a.update(Task(round=1, attempt=0, client=0, version=0))  # type: ignore[method-assign]
    a.login()
    for _ in range(4):
        run.server.turn(0.2)
    assert run.recorder.account.num_rejected == {"bad message": 1}


def test_an_update_of_another_run_or_round_is_stale_and_its_payload_is_not_pulled(
    make: Make,
) -> None:
    run = make(LARGE, method=AVG)
    a, _, _ = two_nodes(run)

    def answer(task: Task) -> list[Said]:
        update, data = a.update(task)
        return [(msgspec.structs.replace(update, attempt=7), data), (update, data)]

    a.answer = answer
    summary = run.finish()
    assert summary["rejected"] == {"stale": 4}
    assert sum(pull.nbytes for pull in a.told(Pull)) == 2 * 2 * 4 * LARGE.size  # of what counts
    assert {r.reason for r in a.told(Reject)} == {"stale: attempt 7, now 0"}


def test_an_update_before_there_are_parameters_is_stale(make: Make) -> None:
    run = make()
    a = Peer(run, "a", 0, 1).login()
    run.until(lambda: any(member.version is not None for member in run.server.desk.roster))
    a.say(*a.update(Task(round=1, attempt=0, client=0, version=0)))
    run.until(lambda: bool(a.told(Reject)))
    assert run.server.central is None
    assert run.recorder.account.num_rejected == {"no round is open": 1}


def test_a_node_that_pulls_more_than_it_was_offered_is_stopped(make: Make) -> None:
    run = make(LARGE, method=AVG, rounds={"quorum": 2})
    a, b, _ = two_nodes(run)
    pulls = int(limits.BREACHES_AT_ONCE) + 40

    def answer(task: Task) -> list[Said]:
        if task.round == 1:
            return [a.update(task)]
        return [(Pull(blob=blob, offset=0, nbytes=1 << 20), None) for blob in [1] * pulls]

    a.answer = answer
    summary = run.finish()
    chunks = sum(len(frames) == 3 for peer, frames in run.net.sent if peer == a.peer)
    assert chunks <= -(-4 * LARGE.size // CHUNK_BYTES)
    assert summary["rejected"]["too many bad messages"] == 1
    assert refusals(b) == []


def test_a_second_payload_under_a_blob_id_in_use_is_refused(make: Make) -> None:
    run = make(LARGE, method=AVG, rounds={"count": 1})
    a, _, _ = two_nodes(run)

    def answer(task: Task) -> list[Said]:
        update, data = a.update(task)
        a.say(update, data)
        a.say(msgspec.structs.replace(a.up[-1], loss=1.0))
        return []

    a.answer = answer
    summary = run.finish()
    assert summary["rejected"] == {"bad message": 2}


def test_a_node_that_resyncs_all_the_time_is_turned_away(make: Make) -> None:
    n = int(limits.RESYNCS_AT_ONCE) + 5
    run = make(rounds={"count": n, "quorum": 2})
    a, b, _ = two_nodes(run)
    sync = Sync(version=0, reason="never content")
    a.answer = lambda task: [(sync, None), a.update(task)] if task.client == 0 else [a.update(task)]
    summary = run.finish()
    assert summary["rejected"]["too many resyncs"] == 1
    assert summary["status"] == "completed"
    assert refusals(b) == []


# --- updates against the task ----------------------------------------------------


def test_an_update_that_claims_more_examples_than_the_task_has_is_refused(make: Make) -> None:
    run = make(method=MEZO | {"batch_size": 4}, rounds={"quorum": 2})
    a, _, _ = two_nodes(run)

    def answer(task: Task) -> list[Said]:
        update, data = a.update(task)
        return [(msgspec.structs.replace(update, examples=5), data)]

    a.answer = answer
    summary = run.finish()
    assert summary["rejected"] == {"examples": 4}
    assert a.told(Reject)[0].reason == "examples: 5 of at most 4"


def test_in_a_pass_over_its_data_a_client_has_no_more_examples_than_there_are(make: Make) -> None:
    run = make(method=AVG | {"steps": 0}, data={"train": 4}, rounds={"quorum": 2})
    a, _, _ = two_nodes(run)

    def answer(task: Task) -> list[Said]:
        update, data = a.update(task)
        return [(msgspec.structs.replace(update, examples=4 + task.client), data)]

    a.answer = answer
    summary = run.finish()
    assert summary["rejected"] == {"examples": 2}  # client 0's and b's may well be
    assert [told.reason for told in a.told(Reject)] == ["examples: 5 of at most 4"] * 2


def test_an_update_that_is_enormous_beside_the_others_is_refused(make: Make) -> None:
    run = make(method=AVG, rounds={"quorum": 2, "count": 3})
    a, _, _ = two_nodes(run)

    def huge(task: Task) -> list[Said]:
        scale = np.float32(1e7 if task.round > 1 else 1)
        own, _ = run.method.local(a.x, *local_arguments(run, task))
        return [a.update(task, a.x + scale * (own.values - a.x))]

    a.answer = huge
    summary = run.finish()
    assert summary["rejected"] == {"norm": 4}
    assert "is over the bound of" in a.told(Reject)[0].reason
    quiet = make(method=AVG, rounds={"quorum": 2, "count": 3, "norm_limit": 0.0})
    c, _, _ = two_nodes(quiet)
    c.answer = lambda task: [c.update(task, c.x + np.float32(1e9))]
    assert quiet.finish()["rejected"] == {}  # switched off


def local_arguments(run: Run, task: Task) -> Any:
    oracle = Quadratic(np.full(run.space.size, 1 + task.client, np.float32))
    return oracle, [None], Work(task.round, Assignment(task.client, task.units))


def test_no_update_is_so_large_that_a_sum_overflows_even_in_the_first_round(make: Make) -> None:
    run = make(method=AVG, rounds={"quorum": 2, "count": 1})
    a, _, _ = two_nodes(run)
    a.answer = lambda task: [a.update(task, np.full(run.space.size, 3e38, np.float32))]
    summary = run.finish()
    assert summary["rejected"] == {"norm": 2}
    assert summary["status"] == "completed"
