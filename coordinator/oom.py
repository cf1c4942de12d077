"""A node that the kernel killed for its memory: what its next login says of that."""

from __future__ import annotations

from collections.abc import Collection

from coordinator.events import Client
from coordinator.state import Phase, Training
from protocol.messages import Hello


def kill(last: Hello, hello: Hello) -> str | None:
    """That the process of the ``last`` login was killed by the kernel, or None."""
    if last.oom_kills is None or hello.oom_kills is None:
        return None
    if hello.pid == last.pid or hello.oom_kills <= last.oom_kills:
        return None
    limit = "" if hello.memory_limit is None else f" of {hello.memory_limit / 1e6:.0f} MB"
    return f"out of memory: the kernel killed node {hello.node} at its limit{limit}"


def task(phase: Phase, clients: Collection[Client]) -> Client | None:
    """Whose task a node was at that hosts these clients: it takes them in their order."""
    if not isinstance(phase, Training):
        return None
    done = {*phase.refs, *phase.failed}
    return next((c for c in sorted(phase.cohort) if c in clients and c not in done), None)
