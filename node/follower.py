"""The ranks of a node's group but the first: load, follow the orders of rank 0, end with it.

    python -m node.follower RANK SIZE DIRECTORY     by rank 0, which says the rest on our input

A follower talks to nobody else and keeps nothing.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from node import orders
from node.engine import Outcome, Ranks, Setup
from node.ranks import (
    POLL_SECONDS,
    GroupError,
    RankError,
    Sheet,
    decoded,
    device_of,
    local_rank,
    met_at_master,
    met_in,
    read_sheet,
)
from node.worker import Worker
from protocol import experiment as experiments
from protocol.errors import RunError
from protocol.messages import Beat, Bye, Task
from protocol.process import command_line

if TYPE_CHECKING:
    from node.group import Group

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a follower stands.

    Attributes:
        rank, size: which of how many.
        meet: gets the store of the ranks.
        interface: of the network; "" is for gloo to choose.
        local_rank: which on its machine.
    """

    rank: int
    size: int
    meet: Callable[[], Any]
    interface: str
    local_rank: int


def serve(sheet: Sheet, place: Place) -> None:
    """Load, and follow until rank 0 says goodbye.

    Raises:
        SeedwireError: the model or the data is not there or does not fit.
        RunError: a rank is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        # no handler of Python's runs while gloo waits; and there is nothing to leave in order
        signal.signal(number, signal.SIG_DFL)
    device = device_of(sheet.device, place.local_rank)
    ranks = Ranks(place.size, sheet.patience_seconds, place.rank, fsdp=sheet.fsdp)
    setup = Setup(sheet.clients, device=device, threads=sheet.threads, run=sheet.run)
    setup = replace(setup, limits=sheet.limits, ranks=ranks)
    experiment = experiments.convert(sheet.experiment, "experiment from rank 0")
    worker = Worker(experiment, setup)
    try:
        group, ready = _met(worker, place, device, ranks)
        log.info("loaded; follows rank 0")
        while (order := _next(group)) is not None:
            message, data, memory = order
            if isinstance(message, Task):
                worker.remind(message, memory)
            outcome = None if isinstance(message, Beat) else worker.run(message, data)
            try:
                orders.end(group, worker, outcome or ready)
            except RankError as error:
                log.info("%s", error)
    except GroupError as error:
        raise RunError(f"rank {place.rank} of a node's group ends: {error}") from error


def _next(group: Group) -> orders.Order | None:
    """The next order, or None when there are no more, whether or not rank 0 said goodbye."""
    try:
        order = orders.receive(group)
    except GroupError as error:
        log.info("rank 0 says nothing any more: %s", error)
        return None
    return None if isinstance(order[0], Bye) else order


def _met(worker: Worker, place: Place, device: str, ranks: Ranks) -> tuple[Group, Outcome]:
    from node.meeting import Meeting, share  # loads torch, after the worker has seen itself bare

    meeting = Meeting(place.meet(), place.rank, place.size)
    meeting.come(worker, device)
    meeting.wait()
    group = meeting.group(ranks.patience_seconds, place.interface, deals=ranks.fsdp)
    return group, share(worker, group)


def launched(group: Ranks) -> None:
    """Follow rank 0 as a process that torchrun started.

    Raises:
        SeedwireError: as of ``serve``.
    """
    try:
        store = met_at_master()
        while not store.check(["sheet"]):  # until rank 0 has found the coordinator, and loaded
            time.sleep(POLL_SECONDS)
        sheet = decoded(store.get("sheet"))
    except RuntimeError as error:  # torch's, of a store that is gone
        raise RunError(f"rank {group.rank} of a node's group: rank 0 is gone") from error
    serve(sheet, Place(group.rank, group.size, lambda: store, "", local_rank()))


def main() -> None:
    """As a process that rank 0 started."""
    rank, size, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    form = f"%(asctime)s %(levelname)s rank {rank}: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, stream=sys.stderr)
    try:
        sheet = read_sheet()
    except EOFError:
        return
    threading.Thread(target=_end_with_rank_0, args=(directory,), daemon=True).start()
    with command_line():
        serve(sheet, Place(rank, size, lambda: met_in(directory, size), "lo", rank))


def _end_with_rank_0(directory: Path) -> None:
    """It holds the other end of our standard input.  At once: there is nothing to keep."""
    while os.read(0, 4096):
        pass
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main()
