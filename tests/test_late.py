"""Late updates that count: which methods can, what they weigh, and a run of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator import events as kinds
from coordinator.policy import checked
from fedalgos import registry
from fedalgos.method import Assignment, Contribution
from protocol import experiment as experiments
from protocol.errors import ExperimentError
from protocol.messages import Task
from protocol.payload import Dense, Sparse
from tests.oracles import f32, space_of
from tests.test_server import Peer, Run, two_nodes

CHANGE = {"name": "fedavg", "steps": 1, "sends": "change"}
FOLDS: list[dict[str, Any]] = [
    CHANGE,
    CHANGE | {"split": True, "server": {"kind": "yogi"}},
    {"name": "flasc", "error_feedback": True},
    {"name": "flasc", "tiers": [0.1, 0.5]},
    {"name": "ffa-lora"},
    {"name": "hetlora", "ranks": [1, 2], "mean": "owners"},
]
DP = {"clip": 1.0, "noise_multiplier": 1.0}
REFUSES: list[tuple[dict[str, Any], str]] = [
    ({"name": "fedavg"}, 'set sends = "change"'),
    ({"name": "fedmezo"}, "of its round"),
    ({"name": "fedkseed"}, "of its round"),
    ({"name": "decomfl"}, "of its round"),
    ({"name": "baffle"}, "of its round"),
    ({"name": "ferret"}, "of its round"),
    ({"name": "fwdllm"}, "of its round"),
    ({"name": "spry"}, "of its round"),
    ({"name": "fedfgd"}, "of its round"),
    ({"name": "flasc", "dp": DP}, "accountant"),
    ({"name": "sparse-adapter"}, "which places"),
    ({"name": "adapter-lth"}, "which places"),
    ({"name": "fedselect"}, "which places"),
    ({"name": "hetlora", "ranks": [2], "weight": "norm"}, 'weight = "norm"'),
    ({"name": "fedavg-allreduce"}, "stay on their nodes"),
    (CHANGE | {"robust": {"kind": "median"}}, "robust"),
]


def experiment(method: dict[str, Any]) -> experiments.Experiment:
    table = {
        "run": {"name": "test"},
        "model": {"id": "random:x"},
        "data": {"id": "x.csv"},
        "partition": {"clients": 8},
        "rounds": {"count": 1, "late": "fold", "target": 4},
        "method": method,
    }
    return experiments.convert(table, "test")


@pytest.mark.parametrize("method", FOLDS, ids=str)
def test_methods_whose_clients_send_changes_fold_late_ones_in(method: dict[str, Any]) -> None:
    checked(experiment(method))


@pytest.mark.parametrize(("method", "why"), REFUSES, ids=str)
def test_the_others_refuse_with_the_reason_before_anything_starts(
    method: dict[str, Any], why: str
) -> None:
    with pytest.raises(ExperimentError, match=why) as refused:
        checked(experiment(method))
    assert str(refused.value).startswith(f'[rounds] late = "fold" is not for {method["name"]}: ')
    assert "\n" not in str(refused.value)


def test_every_method_is_in_one_of_the_tables() -> None:
    names = {m["name"] for m in FOLDS} | {m["name"] for m, _ in REFUSES}
    assert names == {s.__struct_config__.tag for s in registry.AnySettings.__args__}


def test_fedavg_damps_the_change_and_not_the_weight() -> None:
    """x + (n_1 d_1 + n_2 (1 + s)^-a d_2) / (n_1 + n_2), by hand."""
    space = space_of(2)
    method = registry.build(registry.settings(CHANGE), space, 1)
    x = f32(1.0, 2.0)
    state, _ = method.init(x)
    got = (
        Contribution(Assignment(0), 1, Dense(f32(4.0, 0.0))),
        Contribution(Assignment(1), 3, Dense(f32(0.0, 8.0)), damping=0.5),
    )
    _, step = method.aggregate(state, x, 1, got)
    assert step.values.tolist() == [1.0 + 1 * 4.0 / 4, 2.0 + 3 * 0.5 * 8.0 / 4]


def test_flasc_damps_the_change_and_not_the_weight() -> None:
    """W - lr (D_1 + (1 + s)^-a D_2) / 2 with plain SGD at the server, by hand."""
    o = {"name": "flasc", "density_down": 1.0, "density_up": 0.5}
    o |= {"server": {"kind": "sgd", "lr": 1.0}}
    method = registry.build(registry.settings(o), space_of(2), 1)
    x = f32(1.0, 2.0)
    state, _ = method.init(x)
    got = (
        Contribution(Assignment(0), 9, Sparse(2, np.array([0]), f32(4.0))),
        Contribution(Assignment(1), 1, Sparse(2, np.array([1]), f32(8.0)), damping=0.25),
    )
    state, step = method.aggregate(state, x, 1, got)
    assert method.apply(x, 1, step).tolist() == [1.0 - 4.0 / 2, 2.0 - 0.25 * 8.0 / 2]


# --- a run -----------------------------------------------------------------------

ROUNDS = {"count": 5, "deadline_seconds": 100.0, "target": 2, "late": "fold", "max_staleness": 3}


def late_run(directory: Path, power: float = 0.5) -> tuple[Run, Peer, dict[str, Any]]:
    """Node b takes 0.55 s for what a takes 0.1 s for."""
    directory.mkdir()
    run = Run(directory, method=CHANGE, rounds=ROUNDS | {"staleness_power": power})
    _, b, _ = two_nodes(run)

    def slowly(task: Task) -> Any:
        b.delay = 0.55
        return [b.update(task)]

    b.answer = slowly
    summary = run.finish()
    assert run.events(kinds.NodeLost) == []
    run.open.close()
    return run, b, summary


def test_a_slow_node_is_not_waited_for_and_its_updates_count_all_the_same(tmp_path: Path) -> None:
    run, b, summary = late_run(tmp_path / "one")
    assert summary["status"] == "completed"
    lines = [
        json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()
    ]
    stale = [line["stale"] for line in lines if "stale" in line]
    assert stale
    assert {client for clients in stale for client in clients} >= {"2", "3"}
    assert all(line["train_loss"] > 0 for line in lines if "train_loss" in line)
    tasks = [(t.round, t.client) for t in b.told(Task)]
    assert len(set(tasks)) == len(tasks)


def test_the_same_order_of_arrival_gives_the_same_digest(tmp_path: Path) -> None:
    one, two = (late_run(tmp_path / name)[2] for name in ("one", "two"))
    assert one["digest"] == two["digest"]


def test_how_late_an_update_is_makes_a_difference(tmp_path: Path) -> None:
    damped, plain = (late_run(tmp_path / f"{a}", a)[2] for a in (0.5, 0.0))
    assert damped["digest"] != plain["digest"]
