"""Who lets in whom it knows, without files of keys: for benchmarks and tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Keys:
    """Implements ``protocol.router.Doorkeeper``: lets in whom it knows.

    Attributes:
        secret: of the coordinator.
        known: public keys.
    """

    secret: bytes
    known: frozenset[str]

    def admits(self, key: str, address: str) -> bool:
        del address
        return key in self.known

    def turned_away(self, reason: str) -> None:
        raise RuntimeError(reason)
