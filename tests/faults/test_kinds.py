"""Runs in which nothing goes wrong, or little: every method's payloads on real sockets."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from coordinator.archive import Archive
from coordinator.central import Central
from coordinator.journal import Journal
from fedalgos import registry
from fedalgos.space import ParamSpace
from protocol import experiment as experiments
from protocol.payload import Flat
from tests.fakes import events_of
from tests.faults.cluster import Cluster, Ended, Plan, run
from tests.faults.faults import Fault, Kill

pytestmark = [pytest.mark.net, pytest.mark.slow]

Digest = Callable[[str, int], str]

SGD = 'local = { kind = "sgd", lr = 0.5 }'
KINDS = {
    "spry": f"steps = 2\n{SGD}",
    "spry, scalars": f'steps = 1\nwire = "scalars"\n{SGD}',
    "fedfgd": f"steps = 2\n{SGD}",
    "fwdllm": "perturbations = 4\nmax_attempts = 2\nmin_attempts = 2\nkeep = 0.5\nlr = 0.1",
    "fedavg, split": f"steps = 2\nsplit = true\n{SGD}",
    "flasc": f"steps = 3\ndensity_up = 0.9\ndensity_down = 0.9\n{SGD}",
    "hetlora": f"steps = 3\nranks = [1, 2]\n{SGD}",  # each node is of another tier
    "ffa-lora": f"steps = 2\ndp = {{ clip = 1.0, noise_multiplier = 0.1 }}\n{SGD}",
    "fedkseed": "steps = 2\ncandidates = 16\nlr = 0.01\npro = true",
    "decomfl": "steps = 2\nperturbations = 3\nlr = 0.01",
    "baffle": "perturbations = 3\nlr = 0.01",
    "ferret": f"steps = 2\nprojections = 8\nlr = 1.0\n{SGD}",
}


@pytest.mark.parametrize("name", KINDS)
def test_every_payload_kind_crosses_real_sockets(tmp_path: Path, name: str) -> None:
    method = name.split(",")[0]
    settings = f'name = "{method}"\n{KINDS[name]}'
    summary = run(Plan(method, 5, "lora", settings, rounds=2), tmp_path / "it").summary
    assert summary["method"] == method
    assert summary["resyncs"] == 0  # every replica agreed with every digest
    assert summary["rejected"] == {}
    assert summary["loss"]["before"] != summary["loss"]["after"]


def test_a_payload_over_1_mib_travels_in_chunks(tmp_path: Path) -> None:
    ended = run(Plan("dense", 300_000, rounds=2), tmp_path / "it")
    per_update = 4 * 300_000
    assert per_update > 1 << 20
    assert ended.summary["bytes"]["payload_up"] == 2 * 5 * per_update
    assert ended.summary["resyncs"] == 0
    assert sum(moment.phase == "got chunk" for moment in ended.seen) >= 2 * 5 * 2


def test_another_seed_gives_another_model(tmp_path: Path, undisturbed: Digest) -> None:
    assert run(Plan(seed=6), tmp_path / "it").digest != undisturbed("scalar", 24)


def test_a_node_that_is_told_to_stop_leaves_cleanly_and_the_coordinator_knows_why(
    tmp_path: Path,
) -> None:
    plan = Plan(patience_seconds=60.0)  # on a busy machine it is not silence that it leaves by
    with Cluster(plan, tmp_path / "it") as cluster:

        def events(kind: str) -> list[str]:
            found = events_of(tmp_path / "it" / "run")
            return [e.get("reason", "") for e in found if e["event"] == kind]

        cluster.start("coordinator")
        cluster.follow((tmp_path / "it" / "run" / "coordinator.json").exists)  # so has a journal
        cluster.start("node-0")
        cluster.follow(lambda: bool(events("NodeReady")))
        cluster.processes["node-0"].terminate()
        assert cluster.exit_code("node-0") == 0
        cluster.follow(lambda: bool(events("NodeLost")))
        assert events("NodeLost") == ["stopped on this side"]


def test_clients_lost_in_a_round_of_spry_leave_their_units_as_they_were_and_no_others(
    tmp_path: Path,
) -> None:
    settings = f'name = "spry"\n{KINDS["spry"]}'
    lost = Fault("node-1", "train", Kill(), round=2)
    one = run(Plan("spry", 7, "lora", settings, rounds=1), tmp_path / "one")
    two = run(
        Plan("spry", 7, "lora", settings, 5, 2, [lost], left_down=["node-1"], return_seconds=0.5),
        tmp_path / "two",
    )
    assert sorted(two.missing[2]) == ["2", "3"]
    (cohort,) = (
        line["cohort"]
        for line in two.lines("metrics.jsonl")
        if line.get("attempt") == 0 and line["round"] == 2
    )
    slots = {slot for slot, client in enumerate(cohort) if client in (2, 3)}
    (space, before), (_, after) = final(one), final(two)
    moved = [
        not np.array_equal(before[u.start : u.stop], after[u.start : u.stop]) for u in space.units
    ]
    assert moved == [i % 5 not in slots for i in range(7)]  # unit j goes to slot j mod 5


def final(ended: Ended) -> tuple[ParamSpace, Flat]:
    """The parameters that a run ended with, as its journal has them."""
    with closing(Journal(ended.directory)) as journal:
        archive = Archive(journal)
        space = archive.space()
        assert space is not None
        e = experiments.load(ended.directory / "experiment.toml", ())
        method = registry.build(registry.settings(e.method), space, e.run.seed)
        return space, Central(method, space, archive.checkpoint(space.size)[1], archive).x
