"""A cluster of machines on a network of namespaces: cables are pulled, links are slow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.lab.network import Link, Network, impossible
from tests.faults.cluster import CHUNKED, NODES, Plan, run
from tests.faults.faults import HELD, Fault, Partition
from tests.faults.netns import network_of

WHY = impossible()
pytestmark = [
    pytest.mark.net,
    pytest.mark.slow,
    pytest.mark.skipif(WHY is not None, reason=f"{WHY}"),
]

Digest = Callable[[str, int], str]

PHASES = [
    ("node-1", "got welcome", 0),
    ("node-1", "sent ready", 0),
    ("node-1", "got task", 2),
    ("node-1", "train", 2),
    ("node-1", "send update", 2),
    ("node-1", "sent update", 2),
    ("coordinator", "commit", 2),
    ("evaluator", "evaluate", 0),
]
BURST_BYTES = 16_384  # that a capped link lets through at once


@pytest.fixture
def network() -> Iterator[Network]:
    with network_of(["coordinator", "evaluator", *NODES]) as network:
        yield network


def test_a_partition_during_every_phase_heals_without_loss(
    tmp_path: Path, network: Network, undisturbed: Digest
) -> None:
    """One run, whose cables are pulled at one phase after another."""
    script = [Fault(who, phase, Partition(3.0), number) for who, phase, number in PHASES]
    plan = Plan(script=script, patience_seconds=1.0)
    ended = run(plan, tmp_path / "it", network)
    assert set(ended.fired) == set(script)
    assert ended.digest == undisturbed("scalar", 24)
    assert not any(ended.missing.values())


def test_a_link_of_1_mbit_slows_its_own_node_only(
    tmp_path: Path, network: Network, undisturbed: Digest
) -> None:
    network.shape("node-2", Link(down=1_000_000, up=1_000_000))
    plan = Plan("dense", CHUNKED, script=HELD, patience_seconds=30.0)
    ended = run(plan, tmp_path / "it", network)
    assert ended.digest == undisturbed("dense", CHUNKED)
    costs = ended.lines("costs.jsonl")
    assert [line["node"] for line in costs[4::5]] == ["node-2"] * 3
    seconds = [  # an update's come with that of the next round
        line["upload"]["seconds"] for line in costs if line["node"] == "node-2" and "upload" in line
    ]
    assert len(seconds) == 2
    assert min(seconds) > 8 * (4 * CHUNKED - BURST_BYTES) / 1e6  # at 1 Mbit/s
    assert sum(seconds) < ended.seconds
