"""A node of several processes: laws of the methods, shares by hand, and ranks that die."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import distributed

from fedalgos.method import Batch, Vector
from node.fsdp import DealtOracle
from node.group import ROOM, Group, gathered
from node.measure import LimitError
from node.meeting import share
from node.orders import receive, send
from node.ranks import GroupError, RankError
from node.shared import SharedOracle, span
from protocol.messages import Beat, Step, Task
from protocol.noise import Direction
from protocol.payload import DenseSpec, Flat
from tests import test_laws as laws
from tests.oracles import Exact, Quadratic, f32

pytestmark = pytest.mark.net

SIZES = (1, 2, 3)
PATIENCE_SECONDS = 60.0


class Together:
    """A group whose ranks are threads: everything but the processes is the product's."""

    def __init__(self, size: int, patience_seconds: float = PATIENCE_SECONDS) -> None:
        stores: Any = distributed  # it does not say that it exports them
        store = stores.HashStore()
        self._pools = [ThreadPoolExecutor(1) for _ in range(size)]
        self._here = threading.local()

        def join(rank: int) -> Group:
            group = Group(store, rank, size, patience_seconds, interface="lo")
            self._here.group = group
            return group

        self.groups = self.all(join)

    def all(self, job: Callable[[int], Any]) -> list[Any]:
        """What ``job(rank)`` gives in each rank, or the exception that it ends with."""
        futures = [pool.submit(job, rank) for rank, pool in enumerate(self._pools)]
        return [f.exception(PATIENCE_SECONDS) or f.result() for f in futures]

    def each(self, job: Callable[[Group], Any]) -> list[Any]:
        return self.all(lambda rank: job(self.groups[rank]))

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown()

    def __getattr__(self, name: str) -> Any:
        """As a group: the one of the rank that asks."""
        return getattr(self._here.group, name)


@pytest.fixture(scope="module", params=SIZES, ids=lambda n: f"{n} ranks")
def together(request: pytest.FixtureRequest) -> Iterator[Together]:
    made = Together(request.param)
    yield made
    made.close()


@pytest.fixture
def three() -> Iterator[Together]:
    made = Together(3)
    yield made
    made.close()


@dataclass(frozen=True)
class Rows:
    """A mini-batch of vectors, each of some weight."""

    vectors: tuple[Flat, ...]
    weights: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def weight(self) -> int:
        return sum(self.weights)

    def rows(self, start: int, stop: int) -> Rows:
        return Rows(self.vectors[start:stop], self.weights[start:stop])

    def shares(self, size: int) -> Iterator[tuple[Rows, float]]:
        size = size or len(self)
        for start in range(0, len(self), size):
            part = self.rows(start, start + size)
            yield part, part.weight / self.weight


class Linear(Quadratic):
    """A quadratic whose batch is ``Rows``."""

    def _c(self, batch: Batch) -> Exact:
        return self.c.astype(np.float64) + np.average(batch.vectors, 0, batch.weights)


SIGNS, WEIGHTS = (1, 1, -1, -1), (3, 1, 2, 2)  # which cancel out


@dataclass(frozen=True)
class Spread:
    """An oracle of the laws whose batches are rows that differ, with the same mean."""

    inner: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def loss(self, x: Vector, batch: Batch) -> Any:
        return self.inner.loss(x, self._rows(batch, len(x)))

    def grad(self, x: Vector, batch: Batch, ranges: Any = None) -> Any:
        return self.inner.grad(x, self._rows(batch, len(x)), ranges)

    def jvp(self, x: Vector, directions: Any, batch: Batch) -> Any:
        return self.inner.jvp(x, directions, self._rows(batch, len(x)))

    def losses(self, x: Vector, directions: Any, offsets: Any, batch: Batch) -> Any:
        return self.inner.losses(x, directions, offsets, self._rows(batch, len(x)))

    def _rows(self, batch: Batch, size: int) -> Rows:
        middle = np.zeros(size, np.float32) if batch is None else batch
        apart = np.linspace(-1, 1, size, dtype=np.float32)
        return Rows(tuple(middle + sign * apart for sign in SIGNS), WEIGHTS)


def spread(clients: dict[int, Quadratic], group: Any) -> dict[int, Spread]:
    return {
        c: Spread(SharedOracle(Linear(o.c, o.a), group, micro_batch=3)) for c, o in clients.items()
    }


@pytest.fixture
def shared(together: Together, monkeypatch: pytest.MonkeyPatch) -> Together:
    """The laws' clients are nodes of several ranks."""
    monkeypatch.setattr(laws, "CLIENTS", spread(laws.CLIENTS, together))
    return together


LAWS = [
    laws.test_local_borrows_the_parameters_and_answers_what_is_accepted,
    laws.test_the_wire_is_exact_and_the_size_is_known_beforehand,
    laws.test_aggregate_mutates_neither_parameters_nor_state_nor_updates,
    laws.test_apply_mutates_nothing_keeps_float32_and_is_deterministic,
]
LONG = [laws.test_two_clients_on_a_quadratic_converge]
BY_NAME = [laws.test_a_replica_that_replays_all_steps_equals_the_coordinator_to_the_bit]
LONG_BY_NAME = [laws.test_a_state_that_went_through_bytes_goes_on_as_if_it_had_not]


def hold(shared: Together, law: Callable[[Any], None], of: Any) -> None:
    assert shared.all(lambda rank: law(of)) == [None] * len(shared.groups)


@pytest.mark.parametrize("name", laws.ROWS)
def test_a_node_of_several_ranks_keeps_the_laws(shared: Together, name: str) -> None:
    made = laws.ROWS[name](laws.SEED)
    for law in LAWS:
        hold(shared, law, made)
    for law in BY_NAME:
        hold(shared, law, name)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", laws.ROWS)
def test_a_node_of_several_ranks_keeps_the_long_laws(shared: Together, name: str) -> None:
    made = laws.ROWS[name](laws.SEED)
    for law in LONG:
        hold(shared, law, made)
    for law in LONG_BY_NAME:
        hold(shared, law, name)


BACKPROP = ("fedavg", "ferret", "flasc", "sparse-", "adapter-", "fedselect", "ffa-", "hetlora")


@pytest.mark.parametrize("name", laws.ROWS)
def test_every_rank_has_the_update_of_a_process_by_itself(
    together: Together, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """To the bit where only scalars are shared; 8 bits may round a value the other way."""
    made = laws.ROWS[name](laws.SEED)
    sent = {}
    for who, group in (("alone", Together(1)), ("all", together)):
        monkeypatch.setattr(laws, "CLIENTS", spread(original, group))
        by_rank = group.all(lambda rank: laws.contributions(made, laws.START))
        sent[who] = [[c.payload.values for c in found] for found in by_rank]
    (alone,) = sent["alone"]
    for found in sent["all"]:
        for ours, theirs in zip(found, alone, strict=True):
            if not name.startswith(BACKPROP):
                assert ours.tobytes() == theirs.tobytes()
            elif "8 bits" not in name:
                np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


original = dict(laws.CLIENTS)


# --- shares by hand ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "shares"),
    [(7, [(0, 2), (2, 4), (4, 7)]), (3, [(0, 1), (1, 2), (2, 3)]), (1, [(0, 0), (0, 0), (0, 1)])],
)
def test_shares_are_as_even_as_can_be_and_may_be_empty(
    three: Together, count: int, shares: list[tuple[int, int]]
) -> None:
    assert three.each(lambda group: span(count, group)) == shares


def along(key: int) -> Direction:
    return Direction(key, ((0, 2),))


class Noting(Linear):
    """Says what it was asked."""

    def losses(self, x: Vector, directions: Any, offsets: Any, batch: Batch) -> Any:
        asked.setdefault(threading.get_ident(), []).append((directions[0].key, tuple(offsets)))
        return super().losses(x, directions, offsets, batch)

    def jvp(self, x: Vector, directions: Any, batch: Batch) -> Any:
        asked.setdefault(threading.get_ident(), []).append(tuple(z.key for z in directions))
        return super().jvp(x, directions, batch)

    def grad(self, x: Vector, batch: Batch, ranges: Any = None) -> Any:
        asked.setdefault(threading.get_ident(), []).append(batch.weights)
        return super().grad(x, batch, ranges)


asked: dict[int, list[Any]] = {}
ROWS = Rows((f32(1, 0), f32(0, 1), f32(2, 2), f32(5, 0)), WEIGHTS)


def test_points_of_directions_are_shared_and_come_back_in_their_places(three: Together) -> None:
    """Two directions of two points are four; 4 by 3 ranks: one, one and two."""

    def job(group: Group) -> Any:
        oracle, x = SharedOracle(Noting(f32(1, -1)), group), f32(0.5, 0.25)
        found = oracle.losses(x, [along(1), along(2)], (0.1, -0.1), ROWS)
        return found, asked.pop(threading.get_ident(), [])

    want = Linear(f32(1, -1)).losses(f32(0.5, 0.25), [along(1), along(2)], (0.1, -0.1), ROWS)
    (one, first), (two, second), (three_, third) = three.each(job)
    assert one == two == three_ == want
    assert [first, second, third] == [[(1, (0.1,))], [(1, (-0.1,))], [(2, (0.1, -0.1))]]


def test_directions_of_forward_mode_are_shared_and_a_rank_may_have_none(three: Together) -> None:
    def job(group: Group) -> Any:
        oracle, x = SharedOracle(Noting(f32(1, -1)), group), f32(0.5, 0.25)
        return oracle.jvp(x, [along(1), along(2)], ROWS), asked.pop(threading.get_ident(), [])

    want = Linear(f32(1, -1)).jvp(f32(0.5, 0.25), [along(1), along(2)], ROWS)
    (one, first), (two, second), (three_, third) = three.each(job)
    assert one == two == three_ == want
    assert [first, second, third] == [[], [(1,)], [(2,)]]


def test_micro_batches_count_by_their_weight_as_the_whole_does(three: Together) -> None:
    """Parts of three rows and of one, which weigh 6 and 2; no rank has a whole direction."""
    x, z = f32(0.5, 0.25), [along(1), along(2)]

    def job(group: Group) -> Any:
        oracle = SharedOracle(Linear(f32(1, -1)), group, micro_batch=3)
        loss, points = oracle.loss(x, ROWS), oracle.losses(x, z, (0.1, -0.1, 0.3), ROWS)
        return loss, np.array(points), *oracle.jvp(x, z, ROWS)

    whole = Linear(f32(1, -1))
    for loss, points, value, slopes in three.each(job):
        assert (loss, value) == pytest.approx((whole.loss(x, ROWS),) * 2)
        np.testing.assert_allclose(points, whole.losses(x, z, (0.1, -0.1, 0.3), ROWS), rtol=1e-12)
        assert slopes == pytest.approx(whole.jvp(x, z, ROWS)[1])


def test_rows_are_shared_and_gradients_count_by_their_weight(three: Together) -> None:
    """(3 (1, 0) + 1 (0, 1) + 2 (2, 2) + 2 (5, 0)) / 8 is (17, 5) / 8."""

    def job(group: Group) -> Any:
        oracle = SharedOracle(Noting(f32(0, 0)), group)
        loss, gradient = oracle.grad(f32(1, 1), ROWS)
        cut = oracle.grad(f32(1, 1), ROWS, ranges=[(1, 2)])[1]
        alone = oracle.grad(f32(1, 1), ROWS.rows(2, 3))
        return loss, gradient.tolist(), cut.tolist(), alone, asked.pop(threading.get_ident())

    for rank, (loss, gradient, cut, (alone_loss, alone), told) in enumerate(three.each(job)):
        assert loss == pytest.approx(22 / 8)
        assert gradient == pytest.approx([17 / 8, 5 / 8])
        assert cut == pytest.approx([0, 5 / 8])
        assert (alone_loss, alone.tolist()) == (4.0, [2.0, 2.0])  # two ranks without a row
        assert told == [[(3,), (3,)], [(1,), (1,)], [(2, 2), (2, 2), (2,)]][rank]


# --- a model that is dealt --------------------------------------------------------


def test_every_rank_makes_as_many_passes_as_the_one_with_most_rows(three: Together) -> None:
    """Four rows are 1, 1 and 2; by micro-batches of one the last rank has two passes."""

    def job(group: Group) -> Any:
        oracle = DealtOracle(Noting(f32(0, 0)), group, micro_batch=1)
        loss, gradient = oracle.grad(f32(1, 1), ROWS)
        _, alone = oracle.grad(f32(1, 1), ROWS.rows(2, 3))
        return loss, gradient.tolist(), alone.tolist(), asked.pop(threading.get_ident())

    for rank, (loss, gradient, alone, told) in enumerate(three.each(job)):
        assert loss == pytest.approx(22 / 8)
        assert gradient == pytest.approx([17 / 8, 5 / 8])
        assert alone == [2.0, 2.0]
        assert told == [[(3,), (3,), (2,)], [(1,), (3,), (2,)], [(2, 2), (2,)]][rank]


def test_a_rank_that_cannot_go_on_says_so_before_a_pass_and_the_next_task_goes_on(
    three: Together,
) -> None:
    def job(group: Group) -> Any:
        oracle, x = DealtOracle(Linear(f32(1, -1)), group), f32(0.5, 0.25)
        _ordered(group)
        try:
            if group.rank == 1:
                group.end([], LimitError("too long"))
            oracle.loss(x, ROWS)
        except (LimitError, RankError) as error:
            assert group.end([]) == []  # left already
            _ordered(group)
            return str(error), oracle.jvp(x, [along(1)], ROWS)
        return None

    want = Linear(f32(1, -1)).jvp(f32(0.5, 0.25), [along(1)], ROWS)
    reason = "rank 1: LimitError: too long"
    assert three.each(job) == [(reason, want), ("too long", want), (reason, want)]


@dataclass
class Unfit:
    """A worker whose model does not get through its first batch."""

    error: Exception
    micro_batch = 0

    @property
    def trainee(self) -> Any:
        return self

    oracle = Linear(f32(1, -1))

    def deal(self, mesh: object) -> None:
        pass

    def ready(self) -> Any:
        raise self.error


def test_what_is_wrong_with_the_first_batch_is_told_as_it_is(three: Together) -> None:
    def job(group: Group) -> Any:
        return share(cast("Any", Unfit(RuntimeError("no such operation"))), group)

    found = three.each(job)
    assert [(type(e), str(e)) for e in found] == [(RuntimeError, "no such operation")] * 3
    assert not any(group.is_broken for group in three.groups)


def test_a_dealt_model_that_gets_stuck_in_its_first_batch_ends_the_group(three: Together) -> None:
    def job(group: Group) -> Any:
        group.mesh = "theirs"
        return share(cast("Any", Unfit(torch.OutOfMemoryError("no more"))), group)

    why = "a pass of a dealt model broke off: OutOfMemoryError: no more"
    assert [(type(e), str(e)) for e in three.each(job)] == [(GroupError, why)] * 3
    assert all(group.is_broken for group in three.groups)


# --- what ranks say to each other -------------------------------------------------


def test_more_numbers_than_a_record_holds_arrive_whole(three: Together) -> None:
    def job(group: Group) -> Any:
        return group.exchange([group.rank + i / 7 for i in range(ROOM * group.rank)])

    want = [[r + i / 7 for i in range(ROOM * r)] for r in range(3)]
    assert three.each(job) == [want] * 3


def test_a_failure_of_one_ends_the_job_on_all_and_the_next_one_goes_on(three: Together) -> None:
    def job(group: Group) -> Any:
        def compute() -> list[float]:
            if group.rank == 1:
                raise MemoryError("no room")
            return [1.0]

        _ordered(group)
        try:
            gathered(group, compute)
        except (MemoryError, RankError) as error:
            assert group.end([]) == []  # left already
            _ordered(group)
            return str(error), gathered(group, lambda: [2.0]), group.end([3.0])
        return None

    reason = "rank 1: MemoryError: no room"
    rest = ([2.0] * 3, [[3.0]] * 3)
    assert three.each(job) == [(reason, *rest), ("no room", *rest), (reason, *rest)]


def test_a_rank_that_fails_between_exchanges_is_heard_by_those_who_wait_in_one(
    three: Together,
) -> None:
    def job(group: Group) -> Any:
        _ordered(group)
        if group.rank == 0:
            return group.end([], ValueError("diverged"))
        return gathered(group, lambda: [1.0])

    mine, *others = three.each(job)
    assert isinstance(mine, ValueError)
    assert [str(error) for error in others] == ["rank 0: ValueError: diverged"] * 2


def test_ranks_at_different_places_of_a_job_break_the_group(three: Together) -> None:
    def job(group: Group) -> Any:
        _ordered(group)
        return group.end([]) if group.rank == 0 else group.exchange([])

    found = three.each(job)
    assert all(isinstance(error, GroupError) for error in found)
    assert all(group.is_broken for group in three.groups)


def test_a_silent_rank_is_noticed_when_patience_is_over() -> None:
    two = Together(2, patience_seconds=1.0)
    waiting, silent = two.each(lambda group: group.exchange([]) if group.rank == 0 else "silent")
    assert isinstance(waiting, GroupError)
    assert silent == "silent"
    with pytest.raises(GroupError, match="broken"):
        two.groups[0].exchange([])
    two.close()


def test_orders_are_our_own_wire_format_and_carry_what_goes_with_them(three: Together) -> None:
    x = np.arange(5, dtype=np.float32)
    step = Step(version=3, round=3, digest=bytes(16), payload=DenseSpec(5), blob=7)
    task = Task(round=4, client=2, version=3, units=(1,))

    def job(group: Group) -> Any:
        if group.rank == 0:
            send(group, step, memoryview(x.tobytes()))
            send(group, task, memory=x * 2)
            send(group, task)
            send(group, Beat())
            return None
        return [receive(group) for _ in range(4)]

    _, one, two = three.each(job)
    for (s, data, _), (t, nothing, memory), (_, _, none), (beat, *_) in (one, two):
        assert (s.version, bytes(data)) == (3, x.tobytes())
        assert (t, nothing, none, beat) == (task, None, None, Beat())
        np.testing.assert_array_equal(memory, x * 2)


def _ordered(group: Group) -> None:
    if group.rank == 0:
        send(group, Beat())
    else:
        receive(group)
