"""Enrolling, logging in and being revoked: a real desk with a real guard, over real sockets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coordinator import enrolled
from node.admission import Admission
from protocol.channel import to_coordinator, to_node
from protocol.dealer import Dealer
from protocol.errors import KeyRefusedError, KeyStoreError, NetworkError, RefusedError
from protocol.keys import Identity, Token
from protocol.messages import Beat, Enroll, Hello, Refuse, ToNode
from protocol.noise import STREAM
from tests.centre import WITHIN_SECONDS, Centre, centre

__all__ = ["centre"]  # the fixture

pytestmark = pytest.mark.net


@pytest.fixture
def dealers() -> Iterator[Callable[[Centre, Identity], Dealer]]:
    made: list[Dealer] = []

    def make(centre: Centre, identity: Identity) -> Dealer:
        made.append(Dealer(centre.endpoint, identity))
        return made[-1]

    yield make
    for dealer in made:
        dealer.close()


Dealers = Callable[[Centre, Identity], Dealer]


def admission(centre: Centre, directory: Path, name: str, token: Token | None = None) -> Admission:
    return Admission(centre.endpoint, name, directory, token, WITHIN_SECONDS)


def hello(name: str, login: int = 1, client: int = 0) -> Hello:
    return Hello(node=name, software="1.0", stream=STREAM, clients=(client,), pid=7, login=login)


def log_in(dealer: Dealer, name: str, login: int = 1, client: int = 0) -> None:
    assert dealer.send(to_coordinator.pack(hello(name, login, client)))


def told(dealer: Dealer) -> ToNode:
    """The next message of the coordinator that is no beat."""
    deadline = time.monotonic() + WITHIN_SECONDS
    while time.monotonic() < deadline:
        frames = dealer.recv(0.1)
        if frames is None or frames == [b""]:  # what a connection hears before it is cut
            continue
        if (message := to_node.unpack(frames)[0]) != Beat():
            return message
    pytest.fail("the coordinator says nothing")


def hear_the_end(dealer: Dealer) -> None:
    """Until the coordinator has closed the connection."""
    deadline = time.monotonic() + WITHIN_SECONDS
    while not dealer.lost_one():
        assert time.monotonic() < deadline, "the connection is not cut"
        dealer.recv(0.1)


def test_a_token_enrols_once_and_then_no_more(
    centre: Centre, tmp_path: Path, dealers: Dealers
) -> None:
    token = centre.token()
    identity = admission(centre, tmp_path / "a", "a", token).identity()
    assert admission(centre, tmp_path / "a", "a").identity() == identity  # needs it no more
    log_in(dealers(centre, identity), "a")
    centre.until(lambda: centre.logins == ["a"], "a is logged in")
    with pytest.raises(RefusedError, match="does not admit this token: used, expired"):
        admission(centre, tmp_path / "b", "b", token).identity()
    assert centre.guard.refused["used token"] >= 1
    assert enrolled.read(centre.store).nodes == {"a": identity.own.public}


def test_ten_boards_share_a_token_made_for_ten(centre: Centre, tmp_path: Path) -> None:
    token = centre.token(uses=10)
    for i in range(10):
        admission(centre, tmp_path / f"{i}", f"board-{i}", token).identity()
    assert len(set(enrolled.read(centre.store).nodes.values())) == 10
    with pytest.raises(RefusedError, match="does not admit this token"):
        admission(centre, tmp_path / "10", "board-10", token).identity()


def test_an_expired_token_is_refused(centre: Centre, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="does not admit this token"):
        admission(centre, tmp_path / "a", "a", centre.token(valid_seconds=-1.0)).identity()
    assert centre.guard.refused == {"expired token": 1}


def test_a_name_that_is_taken_is_not_given_away_and_the_token_stays_good(
    centre: Centre, tmp_path: Path
) -> None:
    token = centre.token(uses=2)
    admission(centre, tmp_path / "a", "a", token).identity()
    with pytest.raises(RefusedError, match="not enrolled: a is enrolled with another key"):
        admission(centre, tmp_path / "b", "a", token).identity()
    admission(centre, tmp_path / "b", "b", token).identity()
    assert centre.guard.refused == {"enrolment": 1}


def test_a_token_is_for_enrolling_only(centre: Centre, dealers: Dealers) -> None:
    dealer = dealers(centre, centre.token().identity)
    log_in(dealer, "a")
    centre.until(lambda: centre.guard.refused["not an enrolment"] == 1, "it is refused")
    hear_the_end(dealer)
    assert centre.logins == []


def test_an_enrolled_node_cannot_enrol_others(
    centre: Centre, tmp_path: Path, dealers: Dealers
) -> None:
    identity = admission(centre, tmp_path / "a", "a", centre.token()).identity()
    dealer = dealers(centre, identity)
    log_in(dealer, "a")
    dealer.send(to_coordinator.pack(Enroll(node="b", key=bytes(32))))
    centre.until(lambda: centre.logins == ["a"], "a is logged in")
    log_in(dealer, "a", login=2)  # behind the other message
    centre.until(lambda: centre.logins == ["a", "a"], "a is logged in again")
    assert enrolled.read(centre.store).nodes == {"a": identity.own.public}


def test_a_key_that_is_revoked_while_connected_is_cut_off_and_told(
    centre: Centre, tmp_path: Path, dealers: Dealers
) -> None:
    token = centre.token(uses=2)
    a, b = (dealers(centre, admission(centre, tmp_path / n, n, token).identity()) for n in "ab")
    log_in(a, "a")
    log_in(b, "b", client=1)
    centre.until(lambda: sorted(centre.logins) == ["a", "b"], "both are logged in")
    enrolled.change(centre.store, lambda now: now.revoke("a"))
    with pytest.raises(KeyRefusedError, match="does not admit key"):
        told(a)
    centre.until(lambda: centre.gone == [("a", "its key was revoked")], "the coordinator knows")
    assert centre.guard.refused["revoked key"] >= 1
    log_in(b, "b", login=2, client=1)
    centre.until(lambda: centre.logins.count("b") == 2, "b goes on")


def test_a_name_belongs_to_one_key(centre: Centre, tmp_path: Path, dealers: Dealers) -> None:
    token = centre.token(uses=2)
    a, b = (dealers(centre, admission(centre, tmp_path / n, n, token).identity()) for n in "ab")
    log_in(a, "a")
    centre.until(lambda: centre.logins == ["a"], "a is logged in")
    log_in(b, "a", login=9)
    refusal = told(b)
    assert isinstance(refusal, Refuse)
    assert refusal.code == "key"
    assert refusal.reason.startswith("this key is enrolled as b, not as a: start it with --name b")
    assert centre.logins == ["a"]
    assert centre.gone == []
    assert centre.guard.refused == {"another's name": 1}


def test_the_same_key_is_back_at_once(centre: Centre, tmp_path: Path, dealers: Dealers) -> None:
    identity = admission(centre, tmp_path / "a", "a", centre.token()).identity()
    old = dealers(centre, identity)
    log_in(old, "a")
    centre.until(lambda: centre.logins == ["a"], "a is logged in")
    log_in(dealers(centre, identity), "a", login=2)
    refusal = told(old)
    assert isinstance(refusal, Refuse)
    assert refusal.code == "superseded"
    assert centre.logins == ["a", "a"]


def test_another_runs_key_is_refused_and_counted(
    centre: Centre, tmp_path: Path, dealers: Dealers
) -> None:
    other = Centre(tmp_path / "other")
    try:
        theirs = admission(other, tmp_path / "a", "a", other.token()).identity()
    finally:
        other.close()
    ours = Identity(theirs.own, centre.guard.make("x").coordinator)  # type: ignore[union-attr]
    dealer = dealers(centre, ours)
    log_in(dealer, "a")
    with pytest.raises(KeyRefusedError):
        told(dealer)
    assert centre.guard.refused == {"unknown key": 1}
    dealer = dealers(centre, theirs)  # and as it was made: it trusts another coordinator
    log_in(dealer, "a")
    counted = centre.guard.refused
    centre.until(lambda: counted["another coordinator's key"] > 0, "it is counted")
    assert centre.logins == []


def test_a_node_that_is_enrolled_but_heard_no_answer_just_asks_again(
    centre: Centre, tmp_path: Path, dealers: Dealers
) -> None:
    token = centre.token(uses=2)
    node = admission(centre, tmp_path / "a", "a", token)
    first = node.identity()
    (tmp_path / "a" / "coordinator.pub").unlink()  # as if it had died before it wrote that down
    assert node.identity() == first
    assert enrolled.read(centre.store).tokens[token.identity.own.public].uses == 1


def test_no_coordinator_to_enrol_at_is_one_line_in_time(tmp_path: Path) -> None:
    token = Token(bytes(range(32)).hex(), bytes(16))
    node = Admission("tcp://127.0.0.1:1", "a", tmp_path / "a", token, give_up_seconds=0.01)
    with pytest.raises(NetworkError, match=r"no coordinator at tcp://127.0.0.1:1 for \d+ s"):
        node.identity()
    with pytest.raises(KeyStoreError, match=r"no coordinator\.pub"):
        Admission("tcp://127.0.0.1:1", "a", tmp_path / "a").identity()
