"""Sums over a run's training nodes: what its lines, its budget and its summary say of all."""

from __future__ import annotations

from coordinator.account import Account
from coordinator.budget import Spent
from protocol.meter import OTHERS, Meter


def nbytes(account: Account, meter: Meter) -> dict[str, int]:
    """Bytes of the training nodes so far, both ways; of TCP if the kernel knows all nodes."""
    levels = {"payload": meter.payload, "message": meter.message}
    found = {
        f"{level}_{way}": sum(
            count
            for key, count in counter.items()
            if key.way == way and key.node not in account.evaluators
        )
        for level, counter in levels.items()
        for way in ("up", "down")
    }
    return found | _kernel_nbytes(account, meter)


def _kernel_nbytes(account: Account, meter: Meter) -> dict[str, int]:
    nodes = account.nodes.keys() - account.evaluators
    if not nodes or not nodes <= meter.traffic.keys():
        return {}
    known = nodes | ({OTHERS} & meter.traffic.keys())
    traffic = [meter.traffic[node] for node in known]
    found = {
        "tcp_up": sum(t.received for t in traffic),
        "tcp_down": sum(t.sent for t in traffic),
    }
    resent = [t.resent for t in traffic if t.resent is not None]
    return found | ({"tcp_resent_down": sum(resent)} if len(resent) == len(traffic) else {})


def by_kind(account: Account, meter: Meter) -> dict[str, dict[str, int]]:
    """Message bytes by kind and direction."""
    table: dict[str, dict[str, int]] = {}
    for key, count in sorted(meter.message.items()):
        if key.node not in account.evaluators:
            row = table.setdefault(key.kind, {"up": 0, "down": 0})
            row[key.way] += count
    return table


def own_over_kernel(total: dict[str, int]) -> dict[str, float]:
    """Message bytes over those of TCP, of ``nbytes``: what our count is worth; {} if not known."""
    if not total.get("tcp_up") or not total.get("tcp_down"):
        return {}
    return {way: total[f"message_{way}"] / total[f"tcp_{way}"] for way in ("up", "down")}


def spent(account: Account, meter: Meter) -> Spent:
    """What a budget is held against."""
    total, joules = nbytes(account, meter), account.joules
    return Spent(
        total["message_up"] + total["message_down"],
        account.seconds,
        sum(joules.values()) if joules else None,
    )
