"""One run: socket, evaluation worker, loop, summary."""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import closing
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
from coordinator.place import DEFAULT_BIND, Place, secret_of
from coordinator.policy import checked, policy
from coordinator.record import RunRecorder
from coordinator.server import Server
from coordinator.state import Finished
from coordinator.view import View
from fedalgos import registry
from protocol.errors import JournalError, RunError
from protocol.experiment import Experiment
from protocol.notify import Notifier
from protocol.router import Router

log = logging.getLogger(__name__)

TURN_SECONDS = 0.25


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
