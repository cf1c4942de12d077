"""One run: policy from the experiment, socket, evaluation worker, loop, summary."""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from coordinator.begun import Begun, begin, read
from coordinator.evaluator import Evaluator
from coordinator.executor import Settings
from coordinator.guard import Guard
from coordinator.journal import Journal
from coordinator.limits import Quiet
from coordinator.live import Live, write_whole
from coordinator.record import RunRecorder
from coordinator.server import Server
from coordinator.state import Finished, Policy
from coordinator.view import View
from fedalgos import registry, robust
from fedalgos.privacy import SECRET_BYTES
from protocol.errors import ExperimentError, JournalError, RunError
from protocol.experiment import Experiment
from protocol.notify import Notifier
from protocol.transport import Router

log = logging.getLogger(__name__)

TURN_SECONDS = 0.25
DEFAULT_BIND = "tcp://0.0.0.0:5555"


@dataclass(frozen=True)
class Place:
    """Where a run listens and leaves its results.

    Attributes:
        keys: the directory of keys; None does without.
    """

    bind: str
    directory: Path
    starts_evaluator: bool = True
    keys: Path | None = None


def policy(e: Experiment) -> Policy:
    """The machine's numbers, every default resolved."""
    cohort = e.rounds.cohort or e.partition.clients
    target = e.rounds.target or cohort
    return Policy(
        clients=e.partition.clients,
        start_clients=e.nodes.start_clients or e.partition.clients,
        cohort=cohort,
        target=target,
        quorum=e.rounds.quorum or min(target, -(-cohort // 2)),
        rounds=e.rounds.count,
        evaluate_every=e.rounds.evaluate_every,
        deadline_seconds=e.rounds.deadline_seconds,
        return_seconds=e.nodes.return_seconds,
        seed=e.run.seed,
        deadline_mads=e.rounds.deadline_mads if e.rounds.deadline == "adaptive" else None,
        least_seconds=e.rounds.min_deadline_seconds,
        budget=e.budget,
        max_staleness=e.rounds.max_staleness if e.rounds.late == "fold" else 0,
    )


def checked(e: Experiment, keys: Path | None = None) -> registry.AnySettings:
    """The method's settings, with what is wrong found before anything starts.

    Raises:
        ExperimentError: a typo, late updates where they mean nothing, a rule that wants more
            updates than the quorum, or what is not encrypted in a run with keys.
    """
    method = registry.settings(e.method)
    if keys is not None and registry.is_exposed(method):
        raise ExperimentError(
            "[method] what the nodes send each other is not encrypted: "
            "plaintext = true says that it may be so, or all go without keys (--insecure)"
        )
    if e.rounds.late == "fold":
        registry.fold_late(method)
    if (why := robust.too_few(method.robust, policy(e).quorum)) is not None:
        raise ExperimentError(f"[method] {why}")
    return method


def run_directory(root: Path, name: str) -> Path:
    """A new directory ``root/NAME-DATE-TIME``.

    Raises:
        ExperimentError: it cannot be made.
    """
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for attempt in range(1000):
            directory = root / (f"{stem}-{attempt}" if attempt else stem)
            if not directory.exists():
                directory.mkdir()
                return directory
    except OSError as error:
        raise ExperimentError(f"cannot make a run directory in {root}: {error}") from error
    raise ExperimentError(f"no free name for a run directory in {root}")


def claim(directory: Path) -> None:
    """Make the directory of a run to be, or take one that is there.

    Raises:
        ExperimentError: it cannot be made, or holds a run.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExperimentError(f"cannot make {directory}: {error.strerror}") from error
    if (directory / "experiment.toml").exists():
        raise ExperimentError(f"{directory} holds a run already: --resume it")


def secret_of(directory: Path) -> bytes:
    """The run's own secret, in a file that only its owner reads; drawn if there is none."""
    path = directory / "secret"
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
    return path.read_bytes()


class Clock:
    """The run's own time: seconds since it began, which stand still while no coordinator runs.

    Args:
        began_at: what it said when the last coordinator was last known to run.
    """

    def __init__(self, began_at: float) -> None:
        self._zero = time.monotonic() - began_at

    def __call__(self) -> float:
        return time.monotonic() - self._zero


def run(experiment: Experiment, place: Place, console: Console) -> dict[str, Any]:
    """Run an experiment to its end; returns its summary.

    Raises:
        SeedwireError: the port is taken, the model or data does not fit, the run failed, the
            journal cannot be written.
    """
    checked(experiment, place.keys)
    with closing(Journal(place.directory, is_new=True)) as journal:
        begun = begin(journal, place.directory, experiment)
        return _run(begun, experiment, place, journal, console)


def resume(
    directory: Path,
    console: Console,
    bind: str | None = None,
    starts_evaluator: bool = True,
    keys: Path | None = None,
) -> None:
    """Go on with the run in a directory, to its end; one that has ended is left as it is.

    Args:
        directory: of the run.
        console: where its progress is shown.
        bind: where to listen, if not where the run did.
        starts_evaluator: as in ``Place``.
        keys: likewise.

    Raises:
        SeedwireError: as in ``run``; also, there is no run, or another coordinator has it.
    """
    with closing(Journal(directory)) as journal:
        begun, experiment = read(journal, directory)
        if begun.ended is not None:
            _say(console, f"{directory.name}: {begun.ended}, nothing to resume")
            return
        place = Place(bind or begun.endpoint or DEFAULT_BIND, directory, starts_evaluator, keys)
        _run(begun, experiment, place, journal, console)


def _run(
    begun: Begun, experiment: Experiment, place: Place, journal: Journal, console: Console
) -> dict[str, Any]:
    """The run from where its journal is to its end."""
    method, directory = checked(experiment, place.keys), place.directory
    notifier = Notifier()  # before there are children
    guard = Guard(place.keys)
    router = Router(place.bind, guard)
    try:
        (directory / "logs").mkdir(exist_ok=True)
        _log_to(directory / "logs" / "coordinator.log")
        recorder = RunRecorder(directory, experiment, journal)
        is_new = not begun.endpoint
        recorder.begin() if is_new else recorder.resume()
        settings = Settings(
            begun.run,
            begun.software,
            experiment,
            policy(experiment),
            secret_of(directory) if registry.is_private(method) else None,
        )
        clock = Clock(recorder.account.now)
        server = Server(settings, router, recorder, clock, journal, guard)
        recorder.attach(server.desk.meter)
        recorder.num_refused = guard.refused
        begun = begun.keep(journal, endpoint=router.endpoint)
        if not is_new:
            server.resume()
        _announce(server, directory, router.endpoint)
        where = f"listening on {router.endpoint}, results in {directory}"
        again = "" if is_new else f" again, {server.state.round} rounds done"
        _say(console, f"{directory.name}: {where}{again}")
        _warn(guard)
        evaluator = (
            Evaluator(router.endpoint, directory, guard.make("evaluator"))
            if place.starts_evaluator
            else None
        )
        summary = _play(server, recorder, evaluator, console, notifier)
        begun.keep(journal, ended=summary["status"])
        if (failure := _finished(server).reason) is not None:
            raise RunError(failure)
        return summary
    finally:
        router.close()


def _play(
    server: Server,
    recorder: RunRecorder,
    evaluator: Evaluator | None,
    console: Console,
    notifier: Notifier,
) -> dict[str, Any]:
    """Turn by turn to the end, and the goodbyes; returns the summary."""
    reason, is_over = "the coordinator stopped", True
    try:
        with View(console, recorder.directory) as view, Live(server, recorder) as live:
            while not _is_over(server):
                server.turn(TURN_SECONDS)
                if evaluator is not None:
                    evaluator.check()
                notifier.turn(_status(server), is_ready=True)
                if live.update():
                    view.update()
        failure, ended = _finished(server).reason, server.state.ended
        reason = failure or ended or "the run is complete"
        server.save()
        assert server.central is not None  # noqa: S101 - rounds were run on it
        return recorder.finish(server.central, failure, ended)
    except JournalError as error:
        reason, is_over = str(error), False  # it can be resumed: the nodes are to wait for it
        raise
    finally:
        notifier.stopping(reason)
        server.desk.dismiss(reason[:500], finished=is_over)
        if evaluator is not None:
            evaluator.stop()


def _status(server: Server) -> str:
    done, rounds = server.state.round, server.settings.policy.rounds
    return f"{sum(m.trains for m in server.desk.roster)} nodes, {done} of {rounds} rounds done"


def _finished(server: Server) -> Finished:
    assert server.finished is not None  # noqa: S101 - that is when it is over
    return server.finished


def _announce(server: Server, directory: Path, endpoint: str) -> None:
    """Say where we listen, to whoever reads the run directory."""
    announcement = {
        "endpoint": endpoint,
        "pid": os.getpid(),
        "run": directory.name,
        "clients": server.settings.policy.clients,
    }
    write_whole(directory / "coordinator.json", json.dumps(announcement) + "\n")


def _is_over(server: Server) -> bool:
    """Whether the last round is done, and those are here who want to know."""
    return server.finished is not None and not server.is_missed


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def _warn(guard: Guard) -> None:
    if guard.is_open:
        log.warning("--insecure: nothing is encrypted; anybody can read and take part")
    elif guard.expects_nobody:
        log.warning("no node is enrolled yet: seedwire keys token, or seedwire keys enroll")


def _log_to(path: Path) -> None:
    logging.raiseExceptions = False  # a full disk is told once, by whom it stops
    handler = logging.FileHandler(path)
    handler.addFilter(Quiet(time.monotonic))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
