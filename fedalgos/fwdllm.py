"""FwdLLM: perturbed inference, and steps only when the estimates agree well enough.

Xu et al., USENIX ATC 2024, arXiv:2308.13894.  A round is an *attempt*: every client of the
cohort estimates its gradient at the shared parameters along K directions,

    g_k = (f(x + h z_k) - f(x - h z_k)) / (2 h),     or z_k . grad f(x) in forward mode

and sends the g.  The coordinator numbers the directions ("picks"), no two the same in a
run, keeps what comes (``fedalgos.pacing``), and publishes an empty step until the mean is
steady; then

    x <- x - lr_t (1/n) sum_i (1/K_i) sum_k g_ik z_ik       over all n contributions
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from fedalgos import sampling
from fedalgos.limits import Limit
from fedalgos.method import (
    Assignment,
    Batch,
    Contribution,
    Method,
    Oracle,
    Plan,
    Positive,
    Work,
    changed,
)
from fedalgos.pacing import MOST_POOLED, Gauge, Pacing, Pool, passes, variance
from fedalgos.replay import alphas
from fedalgos.robust import Common
from fedalgos.space import ParamSpace
from fedalgos.zeroth import OWN_DIRECTIONS, at_one_point, differences, wants_scalars
from protocol import kernels, noise, picks
from protocol.errors import ExperimentError
from protocol.noise import Direction
from protocol.payload import Flat, Payload, Run, Scalars

PASSES = {"central": 2.0, "jvp": 2.25}  # inferences that one direction takes; docs/benchmarks.md
MOST = 4096  # directions of one client in one attempt: its picks stay within a task's bounds


class FwdLLM(Pacing, frozen=True, kw_only=True, tag="fwdllm"):
    """Settings of FwdLLM.

    Attributes:
        lr: falls linearly to 0 over ``decay_rounds`` rounds, if these are not 0.
        estimator: derivatives from two losses ``eps`` (the paper's h) to either side, or
            by forward mode.
        perturbations: K; with ``grow`` "perturbations", K times the number of the attempt.
        keep: the share of the candidate directions that is used.
    """

    lr: Positive = 0.01
    decay_rounds: Annotated[int, Meta(ge=0, le=1 << 31)] = 0
    estimator: Literal["central", "jvp"] = "central"
    eps: Positive = 0.01
    perturbations: Annotated[int, Meta(ge=1, le=MOST)] = 1
    grow: Literal["clients", "perturbations"] = "clients"
    keep: Annotated[float, Meta(ge=0.001, le=1)] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.estimator == "jvp" and (idle := changed(self, ("eps",))):
            raise ValueError(f'{idle} has no effect with estimator = "jvp"')
        if self.gate == "none" and changed(self, ("grow",)):
            raise ValueError(
                'grow has no effect with gate = "none", where each attempt is a commit'
            )

    @property
    def common(self) -> Common:
        return OWN_DIRECTIONS


@dataclass(frozen=True)
class State:
    """What the server keeps.

    Attributes:
        next: the first pick that is free.
        pool, gauge, attempts: since the last commit, but for the gauge's memory.
        reference: the last committed gradient, (D,), if candidates are ranked by it.
        commits: how many there were.
        last, pooled: the attempts and the contributions that the last one took.
    """

    next: int = 0
    pool: Pool = field(default_factory=Pool.empty)
    gauge: Gauge = field(default_factory=Gauge)
    attempts: int = 0
    reference: Flat | None = None
    commits: int = 0
    last: int = 0
    pooled: int = 0


@dataclass(frozen=True)
class Setup:
    """What the coordinator and every node know alike: settings, space, and seed of the run."""

    o: FwdLLM
    space: ParamSpace
    seed: int

    def key(self, pick: int) -> int:
        """Of a pick's direction, which neither round nor client is in."""
        return noise.key("proposal", self.seed, pick)

    @property
    def probed(self) -> tuple[int, int]:
        """Where the elements are whose variance the gate reads."""
        if self.o.gate != "compat":
            return 0, self.space.size
        start, stop = self.space.offsets[self.o.tensor : self.o.tensor + 2]
        return start, stop


def fwdllm(o: FwdLLM, space: ParamSpace, seed: int) -> Method[State]:
    """Build FwdLLM over a parameter space; ``seed`` is the run's.

    Raises:
        ExperimentError: the gate's tensor does not exist; or, by ``plan``, a cohort with
            which an attempt has more directions than a step can carry.
    """
    if o.gate == "compat" and o.tensor >= len(space.tensors):
        raise ExperimentError(f"[method] tensor {o.tensor} of {len(space.tensors)}")
    known = Setup(o, space, seed)
    return Method(
        init=lambda x: (State(), None),
        plan=partial(plan, known),
        local=partial(local, known),
        accepts=accepts,
        aggregate=partial(aggregate, known),
        apply=partial(apply, known),
        onto="previous",
        metrics=metrics,
        fit=partial(fit, known),
    )


def plan(f: Setup, s: State, round: int, cohort: Sequence[int]) -> tuple[Assignment, ...]:
    """The next free picks, in order of client; or the best of more candidates.

    A round that is tried again has the same ones: nothing came of them, the pool does not
    have them, and another cohort's batches make other derivatives of them.
    """
    count, size = sizes(f.o, s, len(cohort))
    m = len(cohort)
    if s.reference is None:
        chosen = np.arange(s.next, s.next + m * count).reshape(m, count).tolist()
    else:
        chosen = sampling.best(s.reference, s.next, m, size, count, f.key)
    of = dict(zip(sorted(cohort), chosen, strict=True))  # so that a step's picks increase
    return tuple(Assignment(c, picks=(count, *picks.pack(of[c]))) for c in cohort)


def fit(f: Setup, s: State, plan: Plan, limits: Mapping[int, Limit]) -> Plan:
    """Fewer directions, though one at the least, for who has no room or no time for as many."""
    down = 4 * (len(s.pool.values) + sum(a.picks[0] for a in plan))  # a step, if there is one

    def room(limit: Limit) -> int:
        scalars = limit.update_bytes(down) // 4
        # With steps = 0 a task is a pass over the data, and nobody here knows how long that is.
        if limit.passes is None or f.o.steps == 0:
            return scalars
        return min(scalars, int(limit.passes / (f.o.steps * PASSES[f.o.estimator])))

    def fitted(a: Assignment) -> Assignment:
        asked = directions(a)
        most = len(asked)
        if a.client in limits:
            most = max(1, min(room(limits[a.client]), most))
        return replace(a, picks=(most, *picks.pack(asked[:most]))) if most < len(asked) else a

    return tuple(map(fitted, plan))


def sizes(o: FwdLLM, s: State, clients: int) -> tuple[int, int]:
    """Directions and candidates of a client in this attempt of so many.

    Raises:
        ExperimentError: even without growth they are too many.
    """
    most = min(MOST, MOST_POOLED // clients)
    if o.perturbations > most:
        raise ExperimentError(
            f"[method] perturbations {o.perturbations} with a cohort of {clients}: "
            f"an attempt has at most {MOST_POOLED} directions"
        )
    k = o.perturbations * (s.attempts + 1 if o.grow == "perturbations" else 1)
    k = min(k, most)
    return k, k if s.reference is None else sampling.num_candidates(k, o.keep)


def local(
    f: Setup, x: Flat, oracle: Oracle, batches: Iterable[Batch], work: Work
) -> tuple[Payload, float]:
    """The derivatives at the shared parameters, along the assignment's picks."""
    w = oracle.start(x)
    z = [Direction(f.key(pick), f.space.ranges()) for pick in directions(work.assignment)]

    def estimate(batch: Batch) -> tuple[Sequence[float] | Sequence[np.float32], float]:
        if f.o.estimator == "central":
            return differences(oracle, w, z, f.o.eps, batch, "central")
        loss, slopes = oracle.jvp(w, z, batch)
        return slopes, loss

    g, loss = at_one_point(batches, estimate)
    return Scalars((Run(work.assignment.client, len(z)),), g), loss


def accepts(assignment: Assignment, payload: Payload) -> str | None:
    """Why a payload is no answer, or None."""
    if why := wants_scalars(assignment, payload, assignment.picks[0]):
        return why
    # it may wait in the pool for rounds, and there must not spoil all that come after it
    return "a derivative is beyond 1e15" if np.abs(payload.values).max() > 1e15 else None


def aggregate(
    f: Setup, s: State, x: Flat, round: int, contributions: Iterable[Contribution]
) -> tuple[State, Payload]:
    """An empty step while the gate is closed; else the pool's."""
    del x
    arrived = [(directions(c.assignment), c.payload.values) for c in contributions]
    pool, attempts = s.pool.grown(arrived), s.attempts + 1
    gauge = Gauge(single=s.gauge.single)
    if f.o.gate != "none" and len(pool) > 1:
        gauge = gauge.read(variance(pool, f.key, *f.probed), len(pool), f.o.smoothing)
    new = replace(s, next=following(f.o, s, arrived), gauge=gauge)
    if not passes(f.o, gauge, pool, attempts):
        return replace(new, pool=pool, attempts=attempts), Scalars((), np.zeros(0, np.float32))
    done = replace(new, pool=Pool.empty(), attempts=0, commits=s.commits + 1)
    done = replace(done, last=attempts, pooled=len(pool))
    if f.o.keep < 1:
        done = replace(done, reference=gradient(f, pool))
    return done, Scalars(pool.runs(rate(f.o, round - 1)), pool.values)


def following(o: FwdLLM, s: State, arrived: Sequence[tuple[list[int], Flat]]) -> int:
    """The first pick that is free after these, and after candidates that stood beside them."""
    k = max(len(asked) for asked, _ in arrived)
    size = k if s.reference is None else sampling.num_candidates(k, o.keep)
    blocks = (max(asked[-1] for asked, _ in arrived) - s.next) // size + 1
    return s.next + size * max(blocks, 0)


def gradient(f: Setup, pool: Pool) -> Flat:
    """The mean of the pool's contributions, (D,)."""
    g = np.zeros(f.space.size, np.float32)
    kernels.add_(g, [f.key(pick) for pick in pool.picks.tolist()], pool.mean())
    return g


def apply(f: Setup, x: Flat, round: int, step: Payload) -> Flat:
    """X - scale g z for each run and scalar."""
    del round
    assert isinstance(step, Scalars)
    if not step.runs:
        return x.copy()
    keys = [f.key(pick) for run in step.runs for pick in run.numbers()]
    values = np.split(step.values, np.cumsum([run.count for run in step.runs])[:-1])
    along = [alphas(run.scale, v) for run, v in zip(step.runs, values, strict=True)]
    move = np.zeros_like(x)  # summed by itself: single terms would round away beside x
    kernels.add_(move, keys, np.concatenate(along))
    return x + move


def rate(o: FwdLLM, done: int) -> float:
    """The step size after this many rounds: lr (R - done) / R, never below 0."""
    left = (o.decay_rounds - done) / o.decay_rounds if o.decay_rounds else 1.0
    return o.lr * max(left, 0.0)


def directions(assignment: Assignment) -> list[int]:
    """The picks of an assignment, which has how many, and then the picks as written."""
    count, *written = assignment.picks
    if (why := picks.fault(written, count)) or count > MOST:
        raise ValueError(why or f"{count} directions")
    return picks.unpack(written, count)


def metrics(s: State) -> Mapping[str, float]:
    """The gate's view; a variance that was not measured is absent."""
    seen = {"variance": s.gauge.variance, "smoothed_variance": s.gauge.smoothed}
    known = {name: value for name, value in seen.items() if value is not None}
    counts = {"pooled": len(s.pool), "commits": s.commits}
    return known | counts | {"last_attempts": s.last, "last_pooled": s.pooled}
