"""How long an update is on its way: by a clock and a kernel that the test holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest

from node.uploads import LOOK_SECONDS, Uploads


@dataclass
class Line:
    """Implements ``node.uploads.Line`` and ``Held``."""

    sent_bytes: int = 0
    acked: int | None = 0
    blobs: set[int] = field(default_factory=set)
    now: float = 100.0

    def acked_bytes(self) -> int | None:
        return self.acked

    def holds(self, blob: int) -> bool:
        return blob in self.blobs

    def at(self, now: float, uploads: Uploads, acked: int | None) -> float | None:
        """Look then; what has been taken."""
        self.now, self.acked = now, acked
        uploads.look(self, self)
        return uploads.take()


def made() -> tuple[Line, Uploads]:
    line = Line()
    return line, Uploads(lambda: line.now)


def test_an_update_has_arrived_when_its_last_byte_is_acknowledged() -> None:
    line, uploads = made()
    assert uploads.next_look() == math.inf
    line.sent_bytes = 1000
    uploads.began(100.0, None)
    assert line.at(100.5, uploads, 0) is None
    assert uploads.next_look() == pytest.approx(100.5 + 0.05 * 0.5)
    line.sent_bytes = 1060  # a beat, which it does not wait for
    assert line.at(101.0, uploads, 999) is None
    assert line.at(102.5, uploads, 1000) == 2.5
    assert uploads.take() is None
    assert uploads.next_look() == math.inf


def test_a_look_is_soon_at_first() -> None:
    line, uploads = made()
    uploads.began(100.0, None)
    line.at(100.0, uploads, -1)
    assert uploads.next_look() == 100.0 + LOOK_SECONDS


def test_a_large_update_is_pulled_first() -> None:
    line, uploads = made()
    line.sent_bytes, line.blobs = 50, {7}
    uploads.began(100.0, 7)
    assert line.at(101.0, uploads, 50) is None
    assert uploads.next_look() == math.inf  # its pulls wake the node
    line.sent_bytes, line.blobs = 9050, set()
    assert line.at(102.0, uploads, 8000) is None
    assert line.at(103.0, uploads, 9050) == 3.0


def test_those_of_several_clients_are_added_and_one_that_nobody_pulls_holds_up_none() -> None:
    line, uploads = made()
    line.sent_bytes, line.blobs = 50, {7}
    uploads.began(100.0, 7)  # stale: never pulled
    line.sent_bytes = 150
    uploads.began(101.0, None)
    uploads.look(line, line)
    line.sent_bytes = 250
    uploads.began(101.5, None)
    uploads.look(line, line)
    assert line.at(103.0, uploads, 250) == 2.0 + 1.5


def test_one_that_is_withdrawn_before_it_was_pulled_has_not_arrived() -> None:
    line, uploads = made()
    line.blobs = {1}
    uploads.began(100.0, 1)
    assert line.at(101.0, uploads, 0) is None
    line.blobs = set()
    uploads.withdraw(1)
    assert line.at(102.0, uploads, 10_000) is None


def test_what_was_on_a_lost_connection_is_forgotten_and_absent_where_no_kernel_says() -> None:
    line, uploads = made()
    uploads.began(100.0, None)
    uploads.forget()
    assert line.at(103.0, uploads, 10) is None
    uploads.began(103.0, None)
    assert line.at(104.0, uploads, None) is None
    assert line.at(105.0, uploads, 10) is None


def test_what_takes_next_to_no_time_is_added_up_until_it_is_worth_its_bytes() -> None:
    line, uploads = made()
    uploads.began(100.0, None)
    assert line.at(100.03, uploads, 0) is None
    uploads.began(200.0, None)
    assert line.at(200.03, uploads, 0) == pytest.approx(0.06)
    assert uploads.take() is None
