"""Models small enough to check by hand, and a federation of them without a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedalgos.method import Assignment, Batch, Contribution, Method, Oracle, Vector, Work
from fedalgos.space import ParamSpace
from protocol import kernels, payload
from protocol.noise import Direction
from protocol.parts import TensorInfo
from protocol.payload import Flat, Payload, Scalars

Exact = npt.NDArray[np.float64]
Batches = Callable[[int, int], Sequence[Batch]]  # of a client in a round


def f32(*xs: float) -> Flat:
    return np.array(xs, np.float32)


def scalars_of(payload: Payload) -> list[float]:
    assert isinstance(payload, Scalars)
    values: list[float] = payload.values.tolist()
    return values


class Numpy(ABC):
    """Implements Oracle: float32 vectors, everything between them in float64."""

    @abstractmethod
    def value(self, x: Exact, batch: Batch) -> float: ...

    @abstractmethod
    def gradient(self, x: Exact, batch: Batch) -> Exact: ...

    def start(self, x: Flat) -> Vector:
        return np.array(x, np.float32)

    def array(self, x: Flat) -> Vector:
        return np.array(x, np.float32)

    def numpy(self, x: Vector) -> Flat:
        return np.asarray(x, np.float32)

    def loss(self, x: Vector, batch: Batch) -> float:
        return self.value(np.asarray(x, np.float64), batch)

    def grad(
        self, x: Vector, batch: Batch, ranges: Sequence[tuple[int, int]] | None = None
    ) -> tuple[float, Vector]:
        g = self.gradient(np.asarray(x, np.float64), batch).astype(np.float32)
        if ranges is None:
            return self.loss(x, batch), g
        out = np.zeros_like(g)
        for start, stop in ranges:
            out[start:stop] = g[start:stop]
        return self.loss(x, batch), out

    def jvp(
        self, x: Vector, directions: Sequence[Direction], batch: Batch
    ) -> tuple[float, list[float]]:
        g = self.gradient(np.asarray(x, np.float64), batch)
        along = [z.dense(len(x)).astype(np.float64) for z in directions]
        return self.loss(x, batch), [float(g @ z) for z in along]

    def losses(
        self, x: Vector, directions: Sequence[Direction], offsets: Sequence[float], batch: Batch
    ) -> list[tuple[float, ...]]:
        wide = np.asarray(x, np.float64)
        along = [z.dense(len(x)).astype(np.float64) for z in directions]
        return [tuple(self.value(wide + s * z, batch) for s in offsets) for z in along]

    def add_(self, x: Vector, alpha: float, direction: Direction) -> None:
        kernels.add_direction_(x, alpha, direction)


@dataclass(frozen=True)
class Quadratic(Numpy):
    """f = (c + b).x + x'Ax/2, where the batch b is a vector or None; no A is linear."""

    c: Flat
    a: Flat | None = None  # (d, d), symmetric

    def value(self, x: Exact, batch: Batch) -> float:
        bend = 0.0 if self.a is None else x @ self.a @ x / 2
        return float(self._c(batch) @ x + bend)

    def gradient(self, x: Exact, batch: Batch) -> Exact:
        return self._c(batch) + (0.0 if self.a is None else self.a @ x)

    def _c(self, batch: Batch) -> Exact:
        c: Exact = self.c.astype(np.float64)
        return c if batch is None else c + batch


@dataclass(frozen=True)
class Product(Numpy):
    """f = (w2 w1 x - y)^2 / 2, where the batch is (x, y): the two weights talk to each other."""

    def value(self, x: Exact, batch: Batch) -> float:
        return float(self._residual(x, batch) ** 2 / 2)

    def gradient(self, x: Exact, batch: Batch) -> Exact:
        return np.array(self._residual(x, batch) * batch[0] * x[::-1])

    def _residual(self, x: Exact, batch: Batch) -> float:
        return float(x[0] * x[1] * batch[0] - batch[1])


@dataclass(frozen=True)
class Borrowed(Quadratic):
    """Several clients on one node: they train one buffer, and get gradients in another."""

    buffers: tuple[Flat, Flat] = field(kw_only=True)

    def start(self, x: Flat) -> Vector:
        self.buffers[0][:] = x
        return self.buffers[0]

    def grad(
        self, x: Vector, batch: Batch, ranges: Sequence[tuple[int, int]] | None = None
    ) -> tuple[float, Vector]:
        loss, g = super().grad(x, batch, ranges)
        self.buffers[1][:] = g
        return loss, self.buffers[1]


def one_model(*gradients: float) -> dict[int, Oracle]:
    """Clients with linear losses of one parameter, on one node."""
    buffers = (f32(0), f32(0))
    return {i: Borrowed(f32(g), buffers=buffers) for i, g in enumerate(gradients)}


def towards(target: Flat) -> Quadratic:
    """|x - target|^2 / 2, up to a constant."""
    return Quadratic(-target, np.eye(len(target), dtype=np.float32))


def space_of(*sizes: int) -> ParamSpace:
    """One tensor and one unit for each size."""
    return ParamSpace.of([TensorInfo(f"t{i}", (n,), f"u{i}") for i, n in enumerate(sizes)])


def contribution(
    value: Payload, client: int = 0, examples: int = 1, units: tuple[int, ...] = ()
) -> Contribution:
    return Contribution(Assignment(client, units), examples, value)


def over_the_wire(value: Payload) -> Payload:
    return payload.decode(payload.spec_of(value), bytes(payload.encode(value)))


@dataclass(frozen=True)
class Round:
    """What a committed round left behind; round 0 is what ``init`` published."""

    round: int
    x: Flat
    step: Payload
    state: Any


def play(
    method: Method[Any],
    oracles: Mapping[int, Oracle],
    x: Flat,
    rounds: int,
    *,
    examples: Mapping[int, int] | None = None,
    batches: Batches = lambda client, round: [None],
) -> Iterator[Round]:
    """Run rounds 1 to ``rounds`` as a coordinator and its nodes would, bytes and all."""
    start = x
    state, published = method.init(x)
    if published is not None:
        x = method.apply(x, 0, over_the_wire(published))
        yield Round(0, x, published, state)
    for r in range(1, rounds + 1):
        state, step = method.aggregate(
            state, x, r, _contributions(method, state, oracles, x, r, examples or {}, batches)
        )
        step = over_the_wire(step)
        x = method.apply(start if method.onto == "initial" else x, r, step)
        yield Round(r, x, step, state)


def all_at_once(method: Method[Any], oracles: Mapping[int, Oracle], x: Flat) -> Flat:
    """The parameters after a round in which all updates are made before the first is read."""
    state, _ = method.init(x)
    plan = method.plan(state, 1, sorted(oracles))
    sent = [(a, method.local(x, oracles[a.client], [None], Work(1, a))[0]) for a in plan]
    _, step = method.aggregate(state, x, 1, [Contribution(a, 1, update) for a, update in sent])
    return method.apply(x, 1, step)


def _contributions(
    method: Method[Any],
    state: Any,
    oracles: Mapping[int, Oracle],
    x: Flat,
    round: int,
    examples: Mapping[int, int],
    batches: Batches,
) -> Iterator[Contribution]:
    for a in method.plan(state, round, sorted(oracles)):
        sent, loss = method.local(x, oracles[a.client], batches(a.client, round), Work(round, a))
        got = over_the_wire(sent)
        assert method.accepts(a, got) is None
        yield Contribution(a, examples.get(a.client, 1), got, loss)
