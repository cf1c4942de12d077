"""The saving at equal quality, by hand: two runs of straight lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import seedwire
from coordinator.groups import Group, group
from coordinator.results import Result
from coordinator.saving import cost_to, rows, savings
from protocol.errors import ExperimentError

ROOT = Path(__file__).parent.parent


def run(name: str, points: list[tuple[float, float]], seed: int = 1, data: str = "d") -> Result:
    """A run that had reached each metric for so many bytes, and twice as many seconds."""
    summary: dict[str, Any] = {"run": name, "seed": seed, "data": data, "method": name}
    summary |= {"metric": {"name": "accuracy"}, "model": "m", "rounds": 1, "clients": 1}
    table = [
        {"round": i, "metric": m, "bytes": b, "seconds": 2 * b, "joules": None}
        for i, (m, b) in enumerate(points)
    ]
    return Result(summary | {"trained_parameters": 1}, table)


DENSE = run("dense", [(0.1, 10.0), (0.3, 110.0), (0.5, 210.0)])


@pytest.mark.parametrize(
    ("target", "cost"), [(0.1, 10.0), (0.2, 60.0), (0.3, 110.0), (0.45, 185.0), (0.51, None)]
)
def test_the_cost_of_a_target_lies_on_the_line_between_two_evaluations(
    target: float, cost: float | None
) -> None:
    assert cost_to(DENSE, target, "bytes") == pytest.approx(cost)


def test_the_first_time_counts_also_where_the_metric_falls_again() -> None:
    up_and_down = run("x", [(0.1, 0.0), (0.5, 100.0), (0.2, 200.0), (0.5, 300.0)])
    assert cost_to(up_and_down, 0.3, "bytes") == pytest.approx(50.0)


def test_a_cost_that_was_not_measured_is_none() -> None:
    assert cost_to(DENSE, 0.3, "joules") is None


def two_seeds() -> list[Group]:
    """Dense ends at 0.5 for 210, and at 0.4 for 100; sparse gets there for 21 and for 50."""
    return group(
        [
            DENSE,
            run("dense", [(0.1, 0.0), (0.4, 100.0)], seed=2),
            run("sparse", [(0.1, 0.0), (0.5, 21.0), (0.4, 30.0)]),
            run("sparse", [(0.1, 0.0), (0.7, 100.0)], seed=2),
            run("poor", [(0.1, 0.0), (0.41, 10.0)]),
            run("poor", [(0.1, 0.0), (0.41, 310.0 / 3)], seed=2),
            run("elsewhere", [(0.0, 0.0), (0.9, 1.0)], data="other"),
        ]
    )


def test_factors_are_paired_by_seed_and_only_of_those_that_arrived() -> None:
    sparse, poor = savings(two_seeds(), "dense")
    assert (sparse.label, sparse.reached, sparse.seeds) == ("sparse", 2, 2)
    factor = sparse.factors["bytes"]
    assert factor is not None
    assert (factor.mean, factor.low, factor.high) == pytest.approx((6.0, 2.0, 10.0))
    assert sparse.factors["seconds"] == factor
    assert sparse.factors["joules"] is None
    assert (poor.reached, poor.seeds) == (1, 2)
    alone = poor.factors["bytes"]
    assert alone is not None
    assert alone.mean == pytest.approx(1.0)


def test_rows_are_for_people() -> None:
    assert rows(savings(two_seeds(), "dense")) == [
        ["run", "reached", "fewer bytes", "fewer seconds"],
        ["sparse", "2 of 2", "6x (2 to 10)", "6x (2 to 10)"],
        ["poor", "1 of 2", "1x", "1x"],
    ]


def test_a_baseline_that_is_not_there_or_learned_nothing_is_said() -> None:
    with pytest.raises(ExperimentError, match=r"no run dens; there are dense, sparse"):
        savings(two_seeds(), "dens")
    flat = group([run("flat", [(0.1, 0.0), (0.1, 5.0)])])
    with pytest.raises(ExperimentError, match="flat ends no better than it began"):
        savings(flat, "flat")


def test_what_is_worse_by_no_more_than_allowed_is_as_good() -> None:
    groups = group([DENSE, run("near", [(0.1, 0.0), (0.49, 70.0)])])
    assert savings(groups, "dense")[0].reached == 0
    (near,) = savings(groups, "dense", within=0.01)
    assert near.reached == 1
    factor = near.factors["bytes"]
    assert factor is not None
    assert factor.mean == pytest.approx(205.0 / 70.0)


@pytest.mark.parametrize("form", ["text", "json", "markdown"])
def test_the_command_tells_it_of_committed_results(form: str) -> None:
    results = ROOT / "experiments" / "flasc" / "results.json"
    arguments = ["saving", str(results), "--than", "news-dense-r16", "--format", form]
    told = CliRunner().invoke(seedwire.app, arguments)
    assert told.exit_code == 0, told.output
    assert "news-flasc-16" in told.output
    if form == "json":
        rows = {row["label"]: row for row in json.loads(told.stdout)}
        assert "friends-flasc-16" not in rows  # another task
        assert all(0 <= row["reached"] <= row["seeds"] for row in rows.values())


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    told = CliRunner().invoke(seedwire.app, ["saving", str(tmp_path), "--than", "x"])
    assert told.exit_code == 3
    assert told.stderr.count("\n") == 1
    assert "is not a finished run" in told.stderr
