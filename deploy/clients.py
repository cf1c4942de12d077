"""Clients of a host as text: "0,2,5-7", "none", or "" for an even share of what nobody claims."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

NOBODY = "none"


def runs_backwards(clients: str) -> bool:
    """Whether it has a span such as 7-5."""
    return any(first > last for first, last in _bounds(clients))


def numbers(clients: str) -> list[int]:
    """The clients of "0,2,5-7": 0, 2, 5, 6, 7."""
    return [c for first, last in _bounds(clients) for c in range(first, last + 1)]


def spans(clients: Sequence[int]) -> str:
    """Increasing clients as text: 0, 2, 5, 6, 7 is "0,2,5-7"."""
    runs: list[list[int]] = []
    for client in clients:
        if runs and client == runs[-1][1] + 1:
            runs[-1][1] = client
        else:
            runs.append([client, client])
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)


def _bounds(clients: str) -> Iterator[tuple[int, int]]:
    for part in [] if clients in ("", NOBODY) else clients.split(","):
        first, _, last = part.partition("-")
        yield int(first), int(last or first)
