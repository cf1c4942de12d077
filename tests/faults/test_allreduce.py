"""Nodes that average among themselves: real processes over gloo, counted and killed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from coordinator.archive import Archive
from coordinator.journal import Journal
from node.collective import ring_bytes
from protocol.payload import Flat
from tests.faults import cluster
from tests.faults.cluster import CHUNKED, Ended, Plan, run
from tests.faults.faults import Fault, Kill, Stop

pytestmark = [pytest.mark.net, pytest.mark.slow]

Digest = Callable[[str, int], str]
TWO = {"node-0": "0,1", "node-1": "2-4"}
NEVER_SILENT = 20.0  # a machine under load must not be taken for one that is gone


def plan(method: str = "allreduce", size: int = CHUNKED, **changes: object) -> Plan:
    return Plan(method, size, **({"patience_seconds": NEVER_SILENT} | changes))  # type: ignore[arg-type]


def result(ended: Ended) -> Flat:
    """The parameters after the last round."""
    with closing(Journal(ended.directory)) as journal:
        step = Archive(journal)
        return step.step(step.steps[-1]).values


def summed(ended: Ended) -> dict[str, dict[str, int]]:
    """What each node has exchanged with others, all rounds together."""
    total: dict[str, dict[str, int]] = {}
    for line in ended.lines("costs.jsonl"):
        for key, value in line.get("exchanged", {}).items():
            node = total.setdefault(line["node"], {})
            node[key] = node.get(key, 0) + value
    return total


@pytest.mark.parametrize("nodes", [cluster.NODES, TWO], ids=["3 nodes", "2 nodes"])
def test_it_is_fedavg_and_its_bytes_are_those_of_the_kernel_and_of_the_ring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: dict[str, str]
) -> None:
    monkeypatch.setattr(cluster, "NODES", nodes)
    ended = run(plan(), tmp_path / "it")
    reference = run(plan("averaging"), tmp_path / "reference")
    np.testing.assert_allclose(result(ended), result(reference), rtol=1e-6, atol=1e-6)
    assert not any(ended.missing.values())
    assert ended.summary["resyncs"] == 0  # nobody had to be sent what it had made itself

    rounds, ranks, nbytes = ended.summary["rounds"], len(nodes), 4 * CHUNKED
    for node in summed(ended).values():
        assert node["payload"] == rounds * 2 * (ranks - 1) * nbytes // ranks
        for kernel in (node["sent"], node["received"]):
            assert kernel == pytest.approx(node["message"], rel=0.01)
            assert kernel == pytest.approx(node["payload"], rel=0.01)
    total, kinds = ended.summary["bytes"], ended.summary["bytes_by_kind"]
    assert kinds["collective"] == dict.fromkeys(
        ("up", "down"), rounds * ranks * ring_bytes(nbytes, ranks)[1]
    )
    assert kinds["step"]["down"] < 1000  # nodes have the step already
    for way in ("up", "down"):
        assert total[f"tcp_{way}"] == pytest.approx(total[f"message_{way}"], rel=0.01)


def test_the_same_nodes_come_to_the_same_digest(tmp_path: Path, undisturbed: Digest) -> None:
    assert run(plan(), tmp_path / "it").digest == undisturbed("allreduce", CHUNKED)


@pytest.mark.parametrize(
    ("who", "phase"),
    [("node-0", "met"), ("node-0", "send reduced"), ("node-1", "got reduce"), ("node-1", "met")],
)
def test_a_node_that_is_killed_and_comes_back_changes_nothing_in_the_result(
    tmp_path: Path, undisturbed: Digest, who: str, phase: str
) -> None:
    ended = run(plan(script=[Fault(who, phase, Kill(), round=2)]), tmp_path / "it")
    assert ended.digest == undisturbed("allreduce", CHUNKED)
    assert not any(ended.missing.values())


def test_a_node_that_is_killed_in_the_all_reduce_fails_the_attempt_for_all_and_is_left_out(
    tmp_path: Path,
) -> None:
    fault = Fault("node-1", "met", Kill(), round=2)
    ended = run(plan(script=[fault], left_down=["node-1"], return_seconds=0.5), tmp_path / "it")
    assert ended.summary["status"] == "completed"
    (reason,) = ended.summary["rejected"]
    assert reason == "node node-1 was lost in the all-reduce"
    assert set(ended.missing[2]) == set(ended.missing[3]) == {"2", "3"}
    assert all("node-1 lost" in why for why in ended.missing[2].values())
    said = (tmp_path / "it" / "logs" / "node-0.log").read_text()
    assert "round 2: the all-reduce failed: " in said
    assert "Traceback" not in said


def test_a_node_that_stops_in_the_all_reduce_is_waited_for_so_long_and_no_longer(
    tmp_path: Path,
) -> None:
    fault = Fault("node-1", "met", Stop(60.0), round=2)
    stopped = plan(script=[fault], left_down=["node-1"], return_seconds=0.5, patience_seconds=8.0)
    ended = run(stopped, tmp_path / "it")
    assert ended.summary["status"] == "completed"
    assert set(ended.missing[2]) == {"2", "3"}


def test_a_coordinator_that_is_killed_in_the_all_reduce_goes_on(
    tmp_path: Path, undisturbed: Digest
) -> None:
    fault = Fault("coordinator", "got reduced", Kill(), round=2, nth=2)
    ended = run(plan(script=[fault]), tmp_path / "it")
    assert ended.digest == undisturbed("allreduce", CHUNKED)
    assert not any(ended.missing.values())
