"""What a node's beats say, and when they say nothing new."""

from __future__ import annotations

from node.beats import PROGRESS_SECONDS, Beats
from protocol.channel import to_coordinator
from protocol.messages import Beat
from protocol.parts import Progress


def far(done: int) -> Progress:
    return Progress(round=1, client=2, done=done, total=9)


def test_what_the_coordinator_knows_is_not_said() -> None:
    beats = Beats("loading")
    assert beats.next("loading", None, 0.0) == Beat()
    assert beats.next("loading", None, 1e6) == Beat()
    assert beats.next("waiting", None, 1e6) == Beat(busy="waiting")


def test_what_changes_is_said_at_once_and_so_is_a_return_to_it() -> None:
    beats = Beats("waiting")
    said = [beats.next(busy, None, 0.0).busy for busy in ("waiting", "a", "a", "waiting", "a")]
    assert said == ["", "a", "", "waiting", "a"]


def test_the_progress_of_one_task_is_said_now_and_then() -> None:
    beats = Beats("waiting")
    assert beats.next("task", far(1), 100.0) == Beat(busy="task", progress=far(1))
    assert beats.next("task", far(2), 100.0 + PROGRESS_SECONDS - 0.1) == Beat()
    assert beats.next("task", far(3), 100.0 + PROGRESS_SECONDS) == Beat(
        busy="task", progress=far(3)
    )
    assert beats.next("task", far(4), 101.0 + PROGRESS_SECONDS) == Beat()
    assert beats.next("waiting", None, 102.0 + PROGRESS_SECONDS) == Beat(busy="waiting")


def test_a_beat_that_says_nothing_is_a_frame_of_one_byte() -> None:
    assert sum(map(len, to_coordinator.pack(Beat()))) == 1
    said = to_coordinator.pack(Beat(busy="round 1, client 2", progress=far(1)))
    assert sum(map(len, said)) == 49
