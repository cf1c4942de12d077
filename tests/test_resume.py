"""A coordinator that is killed and resumed, in virtual time: the run ends as if it never was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import archive, eventlog, executor, rounds
from coordinator.journal import Journal
from coordinator.state import State
from protocol.messages import Task
from protocol.payload import Run as Scalar
from protocol.payload import Scalars, encode, spec_of
from tests.fakes import in_memory
from tests.oracles import space_of
from tests.test_journal import crashed
from tests.test_server import AVG, MEZO, TURN, Peer, Run, Said

SPACE = space_of(10, 6)
METHODS: dict[str, dict[str, Any]] = {
    "scalars": MEZO,
    "scalars, with rates": MEZO | {"signal": "model-diff"},
    "scalars from the start": {"name": "fedkseed", "lr": 0.01, "candidates": 16, "pro": True},
    "scalars and state": {"name": "fwdllm", "perturbations": 3, "max_attempts": 2, "keep": 0.5},
    "sparse": {"name": "flasc", "density_up": 0.5, "density_down": 0.5, "server": {"kind": "adam"}},
    "dense": AVG,
    "dense, with moments": AVG | {"server": {"kind": "yogi", "lr": 0.05}},
    "dense, in parts": AVG | {"split": True, "server": {"kind": "sgd", "lr": 0.5, "momentum": 0.9}},
    "blocks": {"name": "ferret", "projections": 4, "local": {"kind": "sgd", "lr": 0.05}},
}


class KilledError(Exception):
    """By a test, at a message that was about to leave or to be read."""


def sections(method: str) -> dict[str, Any]:
    return {"method": METHODS[method], "rounds": {"count": 3, "evaluate_every": 2}}


def start(directory: Path, method: str) -> Run:
    directory.mkdir()
    run = Run(directory, SPACE, **sections(method))
    for peer in (Peer(run, "a", 0, 1), Peer(run, "b", 2, 3), Peer(run, "evaluator")):
        peer.answer = partial(answer, peer)
        peer.login()
    return run


def answer(peer: Peer, task: Task) -> list[Said]:
    """An update with a loss of its own in each round."""
    update, data = peer.update(task)
    return [(msgspec.structs.replace(update, loss=task.client + 10.0 * task.round), data)]


def killed_at(run: Run, number: int) -> bool:
    """Play to the end or to the n-th message, either way; whether it came to that."""
    steps = iter(range(number))

    def unless_killed(what: Callable[..., Any]) -> Callable[..., Any]:
        def do(*args: Any) -> Any:
            if next(steps, None) is None:
                raise KilledError
            return what(*args)

        return do

    net: Any = run.net
    net.send, net.recv = unless_killed(net.send), unless_killed(net.recv)
    try:
        while run.server.finished is None:
            run.server.turn(TURN)
    except KilledError:
        return True
    return False


def resumed(run: Run, method: str) -> Run:
    """Another coordinator on what the first one left on the disk, and the same nodes."""
    left = crashed(run.directory, run.directory.with_name(run.directory.name + "+"))
    run.open.close()
    after = Run(left, SPACE, resumes=True, **sections(method))
    for old in run.peers.values():
        name = f"{old.name} again {left.name}".encode()
        if old.evaluates:  # it ends with its coordinator, and another one starts anew
            Peer(after, old.name, peer=name).login()
            continue
        old.run, old.peer = after, name
        old.jobs.clear()
        after.peers[name] = old
        old.login(at=after.net.now, login=len(left.name))
    return after


def story(run: Run) -> tuple[Any, ...]:
    """What must not depend on how often the coordinator was killed."""
    summary = run.finish()
    text = (run.directory / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        del line["bytes"], line["seconds_total"]
        line.pop("seconds", None)
    assert lines == [
        {k: v for k, v in json.loads(line).items() if not k.endswith(("bytes", "total", "seconds"))}
        for line in run.open.logged("metrics.jsonl")
    ]
    costs = len((run.directory / "costs.jsonl").read_text().splitlines())
    norms, _ = run.server.executor.intake.norms.known()
    return summary["digest"], summary["rounds"], summary["rejected"], lines, costs, norms


@contextmanager
def saving_every(seconds: float) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "SAVE_SECONDS", seconds)
        yield


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, tuple[Any, ...]]:
    ends = {}
    for method in METHODS:
        with in_memory() as name:
            run = start(Path(name, "run"), method)
            with closing(run.open):
                ends[method] = story(run)
    return ends


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=8)
@given(
    messages=st.lists(st.integers(1, 50), min_size=1, max_size=3),
    save_seconds=st.sampled_from([0.0, 0.1, 1.0]),
    replay_seconds=st.sampled_from([0.0, 2.0]),
)
def test_a_run_that_was_killed_anywhere_ends_as_if_it_had_not_been(
    undisturbed: dict[str, tuple[Any, ...]],
    method: str,
    messages: list[int],
    save_seconds: float,
    replay_seconds: float,
) -> None:
    with (
        in_memory() as name,
        saving_every(save_seconds),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(archive, "REPLAY_SECONDS", replay_seconds)
        run, kills = start(Path(name, "run"), method), 0
        for number in messages:
            if killed_at(run, number):
                run, kills = resumed(run, method), kills + 1
        with closing(run.open):
            assert story(run) == undisturbed[method]
            assert run.recorder.account.num_resumed == kills
            assert run.recorder.account.num_resyncs == 0  # nobody was sent what was not durable
            replayed = State()
            for event in eventlog.read(run.open):
                replayed, _ = rounds.step(replayed, event, run.policy)
            assert replayed == run.server.state


def test_a_kill_at_each_message_with_everything_saved_loses_no_update_and_no_measurement(
    undisturbed: dict[str, tuple[Any, ...]],
) -> None:
    """With half of a round's updates on the disk, which random kills seldom leave."""
    method, number, held = "dense, with moments", 0, list[int]()
    while len(held) == number:
        with in_memory() as name, saving_every(0.0):
            run, number = start(Path(name, "run"), method), number + 1
            if killed_at(run, number):
                run = resumed(run, method)
                held.append(len(run.server.executor.intake.updates))
            with closing(run.open):
                assert story(run) == undisturbed[method]
    assert set(held) == {0, 1, 2, 3}


def test_parameters_are_kept_once_the_steps_would_take_long_to_apply(tmp_path: Path) -> None:
    with closing(Journal(tmp_path, is_new=True)) as journal:
        space, x = space_of(3), np.zeros(3, np.float32)
        kept, spec = archive.Archive(journal), Scalars((Scalar(0, 1),), x[:1])
        kept.begin(space, x, archive.Version(0, 0.0, (b"",)))
        for number in range(1, 6):
            version = archive.Version(number, 0.9, (b"",))
            kept.add(number, version, spec_of(spec), encode(spec))
            kept.tidy(x + number, "previous", oldest=number)
            again = archive.Archive(journal)
            at = 3 if number >= 3 else 0  # 2.7 s after three steps
            start, found = again.checkpoint(3)
            assert (start, found.tolist()) == (at, [at] * 3)
            assert again.steps == (list(range(at + 1, number + 1)) or [number])
