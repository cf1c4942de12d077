"""What a run came to, in one table: ``summary.json``, whose keys are a public promise.

They are defined in docs/summary.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from coordinator import totals
from coordinator.account import Account
from coordinator.central import Central
from coordinator.quality import Quality
from protocol.experiment import Experiment
from protocol.meter import Meter

SUMMARY_VERSION = 1


def summarise(
    experiment: Experiment,
    central: Central,
    account: Account,
    meter: Meter,
    *,
    refused: Mapping[str, int],
    reason: str | None,
    ended: str | None,
) -> dict[str, Any]:
    """The table.

    Args:
        experiment: as resolved.
        central: with the final parameters.
        account: of the whole run.
        meter: likewise.
        refused: how often the guard turned somebody away, by reason.
        reason: why the run failed, or None.
        ended: why it has fewer rounds than it was to have, or None.
    """
    return {
        "version": SUMMARY_VERSION,
        "run": experiment.run.name,
        "status": "completed" if reason is None else f"failed: {reason}",
        **({"ended": ended} if ended else {}),
        "method": experiment.method["name"],
        "model": experiment.model.id,
        "data": experiment.data.id,
        "seed": experiment.run.seed,
        "rounds": account.num_rounds,
        "clients": experiment.partition.clients,
        "nodes": sum(node["role"] == "train" for node in account.nodes.values()),
        "trained_parameters": central.space.size,
        **_quality(experiment, account),
        **_bytes(account, meter),
        "memory_bytes": account.peaks | {"over_inference": account.over_inference},
        "seconds": _seconds(account),
        **({"joules": account.joules} if account.joules else {}),
        "digest": central.digest.hex(),
        "rejected": account.num_rejected,
        "refused": dict(refused),
        "resyncs": account.num_resyncs,
        "resumed": account.num_resumed,
    }


def _quality(experiment: Experiment, account: Account) -> dict[str, Any]:
    """At the first evaluation and at the last."""
    quality = Quality.of(experiment)
    (_, before), (_, after) = account.scores[0], account.scores[-1]
    return {
        "metric": {"name": quality.name, "before": before.metric, "after": after.metric},
        "loss": {"before": before.loss, "after": after.loss},
        **quality.summary(before, after),
    }


def _bytes(account: Account, meter: Meter) -> dict[str, Any]:
    total, per = totals.nbytes(account, meter), max(1, account.client_rounds)
    return {
        "bytes": total | {"per_client_round": {k: v / per for k, v in total.items()}},
        "bytes_by_kind": totals.by_kind(account, meter),
        "own_over_kernel": totals.own_over_kernel(total),
        "compared": account.compared,
        "unexplained": msgspec.to_builtins(account.unexplained),
    }


def _seconds(account: Account) -> dict[str, Any]:
    train = sum(account.train_seconds.values()) / (len(account.train_seconds) or 1)
    return {
        "total": account.seconds,
        "train": train,
        "wait": max(0.0, account.seconds - train),
        "by_phase": account.phase_seconds,
    }
