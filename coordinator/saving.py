"""What each group of runs took to reach what a baseline reached: the saving at equal quality.

Cost at a target is where the metric first passes it, on straight lines between evaluations;
runs are paired by their seed, which gives both the same data, clients and cohorts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.groups import Group, Spread, tasks
from coordinator.measures import percent
from coordinator.results import Result
from protocol.errors import ExperimentError

AXES = ("bytes", "seconds", "joules")


@dataclass(frozen=True)
class Saving:
    """One group beside the baseline.

    Attributes:
        reached: how many of the seeds, of ``seeds`` that both have, came to the target.
        factors: the baseline's cost over this group's, over the seeds that did; None where
            none did, or where the cost was not measured.
    """

    label: str
    seeds: int
    reached: int
    factors: dict[str, Spread | None]


def cost_to(result: Result, target: float, axis: str) -> float | None:
    """The cost at which the metric first was ``target``; None if it never was."""
    before = None
    for point in result.points:
        metric, cost = point["metric"], point[axis]
        if cost is None:
            return None
        if metric >= target:
            if before is None or metric == before[0]:
                return float(cost)
            share = (target - before[0]) / (metric - before[0])
            return float(before[1] + share * (cost - before[1]))
        before = metric, cost
    return None


def savings(groups: Sequence[Group], baseline: str, within: float = 0.0) -> list[Saving]:
    """Every other group of the baseline's task, beside it.

    The target is the metric at the baseline's end, seed by seed, less ``within``.

    Raises:
        ExperimentError: no group has that label, or it did not learn.
    """
    than = next((g for g in groups if g.label == baseline), None)
    if than is None:
        raise ExperimentError(f"no run {baseline}; there are {', '.join(g.label for g in groups)}")
    if any(r.points[-1]["metric"] <= r.points[0]["metric"] for r in than.results):
        raise ExperimentError(f"{baseline} ends no better than it began: there is nothing to reach")
    peers = next(found for found in tasks(groups).values() if than in found)
    return [_beside(g, than, within) for g in peers if g is not than]


def _beside(group: Group, than: Group, within: float) -> Saving:
    own = {r.summary["seed"]: r for r in group.results}
    pairs = [(own[r.summary["seed"]], r) for r in than.results if r.summary["seed"] in own]
    arrived = [
        (r, base, target)
        for r, base in pairs
        if max(p["metric"] for p in r.points) >= (target := _end(base) - within)
    ]
    factors = {axis: Spread.of([_factor(*pair, axis) for pair in arrived]) for axis in AXES}
    return Saving(group.label, len(pairs), len(arrived), factors)


def _end(base: Result) -> float:
    return float(base.points[-1]["metric"])


def _factor(result: Result, base: Result, target: float, axis: str) -> float | None:
    theirs, ours = cost_to(base, target, axis), cost_to(result, target, axis)
    return theirs / ours if theirs and ours else None


def rows(found: Sequence[Saving]) -> list[list[str]]:
    """For people: the run, how many seeds reached the target, and each factor that is known."""
    axes = [a for a in AXES if any(s.factors[a] for s in found)]
    return [["run", "reached", *(f"fewer {axis}" for axis in axes)]] + [
        [s.label, f"{s.reached} of {s.seeds}", *(_times(s.factors[axis]) for axis in axes)]
        for s in found
    ]


def _times(factor: Spread | None) -> str:
    if factor is None:
        return "-"
    text = f"{factor.mean:.2g}x"
    same = f"{factor.low:.2g}" == f"{factor.high:.2g}"
    return text if same else f"{text} ({factor.low:.2g} to {factor.high:.2g})"


def heading(groups: Sequence[Group], baseline: str, within: float) -> str:
    """What is compared, for people."""
    ends = Spread.of([_end(r) for g in groups if g.label == baseline for r in g.results])
    reach = f"{percent(ends.mean - within)} %" if ends else "absent"
    less = f" less {percent(within)}" if within else ""
    return f"What it took to reach {reach}, where {baseline} ended{less}:"
