"""What an experiment means for the round machine, and whether it can mean it."""

from __future__ import annotations

from pathlib import Path

from coordinator.state import Policy
from fedalgos import registry, robust
from protocol.errors import ExperimentError
from protocol.experiment import Experiment


def policy(e: Experiment) -> Policy:
    """The machine's numbers, every default resolved."""
    cohort = e.rounds.cohort or e.partition.clients
    target = e.rounds.target or cohort
    return Policy(
        clients=e.partition.clients,
        start_clients=e.nodes.start_clients or e.partition.clients,
        cohort=cohort,
        target=target,
        quorum=e.rounds.quorum or min(target, -(-cohort // 2)),
        rounds=e.rounds.count,
        evaluate_every=e.rounds.evaluate_every,
        deadline_seconds=e.rounds.deadline_seconds,
        return_seconds=e.nodes.return_seconds,
        seed=e.run.seed,
        deadline_mads=e.rounds.deadline_mads if e.rounds.deadline == "adaptive" else None,
        least_seconds=e.rounds.min_deadline_seconds,
        budget=e.budget,
        max_staleness=e.rounds.max_staleness if e.rounds.late == "fold" else 0,
    )


def checked(e: Experiment, keys: Path | None = None) -> registry.AnySettings:
    """The method's settings, with what is wrong found before anything starts.

    Raises:
        ExperimentError: a typo, late updates where they mean nothing, a rule that wants more
            updates than the quorum, or what is not encrypted in a run with keys.
    """
    method = registry.settings(e.method)
    if keys is not None and registry.is_exposed(method):
        raise ExperimentError(
            "[method] what the nodes send each other is not encrypted: "
            "plaintext = true says that it may be so, or all go without keys (--insecure)"
        )
    if e.rounds.late == "fold":
        registry.fold_late(method)
    if (why := robust.too_few(method.robust, policy(e).quorum)) is not None:
        raise ExperimentError(f"[method] {why}")
    return method
