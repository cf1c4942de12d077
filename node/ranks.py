"""The processes of a node's group: started by rank 0 itself, or all of them by torchrun.

A rank that we started ends when rank 0 does, even by kill -9: it watches the pipe that is
its standard input.  After a death all are started anew: they keep nothing but what rank 0
can tell them.  Without torch, which rank 0 loads later.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import msgspec

from protocol.parts import Limits

SETTLE_SECONDS = 2.0  # from a closed connection to the exit status of whoever had it
POLL_SECONDS = 0.1


class GroupError(Exception):
    """A rank is gone, silent, or not where the others are: the group is of no more use."""


class RankError(Exception):
    """Another rank could not do its part of a job."""


class Sheet(msgspec.Struct, frozen=True):
    """What a follower is told before it loads.

    Attributes:
        experiment: as the coordinator sent it.
        clients: whose data.
        device, threads, limits: as of ``node.engine.Setup``, for each rank.
        run: the id of the run.
        patience_seconds, fsdp: as of ``node.engine.Ranks``.
    """

    experiment: dict[str, Any]
    clients: tuple[int, ...]
    device: str
    threads: int
    run: str
    patience_seconds: float
    limits: Limits | None = None
    fsdp: bool = False


class Launch(Protocol):
    """How the other ranks come to be.

    Attributes:
        interface: of the network that they meet on; "" is for gloo to choose.
        can_restart: after a death they can be had again.
        local_rank: rank 0's, on its machine.
    """

    interface: str
    can_restart: bool
    local_rank: int

    def store(self) -> Any:
        """Where the ranks find each other."""

    def ended(self, patience_seconds: float = 0.0) -> str:
        """Which of them have ended and how; waits so long for one to."""

    def close(self) -> None:
        """End them."""


class Started:
    """Processes of this machine, that meet in a file and on the loopback interface."""

    interface, can_restart, local_rank = "lo", True, 0

    def __init__(self, sheet: Sheet, size: int) -> None:
        self._directory, self._size = Path(tempfile.mkdtemp(prefix="seedwire-ranks-")), size
        told = msgspec.msgpack.encode(sheet)
        self._processes = {rank: self._start(rank, told) for rank in range(1, size)}

    def _start(self, rank: int, told: bytes) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "node.follower", str(rank), str(self._size)]
        process = subprocess.Popen(  # noqa: S603
            [*command, str(self._directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for rank 0
            env=os.environ | {"PYTHONSAFEPATH": "1"},  # a folder "node" must not shadow ours
        )
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it has ended: that is noticed later
                process.stdin.write(struct.pack("<I", len(told)) + told)
                process.stdin.flush()
        return process

    def store(self) -> Any:
        return met_in(self._directory, self._size)

    def ended(self, patience_seconds: float = 0.0) -> str:
        until = time.monotonic() + patience_seconds
        while True:
            codes = {rank: p.poll() for rank, p in self._processes.items()}
            over = {rank: code for rank, code in codes.items() if code is not None}
            if over or time.monotonic() >= until:
                break
            time.sleep(0.01)
        # one that was killed takes the others with it
        killed = {rank: code for rank, code in over.items() if code < 0}
        return ", ".join(f"rank {rank} {_how(code)}" for rank, code in (killed or over).items())

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        shutil.rmtree(self._directory, ignore_errors=True)


class Joined:
    """Processes that torchrun started, and starts again; on any number of machines."""

    interface, can_restart = "", False

    def __init__(self, sheet: Sheet) -> None:
        self._sheet, self.local_rank = sheet, local_rank()

    def store(self) -> Any:
        store = met_at_master()
        store.set("sheet", msgspec.msgpack.encode(self._sheet))
        return store

    def ended(self, patience_seconds: float = 0.0) -> str:
        del patience_seconds
        return ""

    def close(self) -> None:
        pass


def read_sheet() -> Sheet:
    """From standard input, as ``Started`` writes it.

    Raises:
        EOFError: whoever wrote has ended.
    """
    (length,) = struct.unpack("<I", _read(4))
    return decoded(_read(length))


def decoded(told: bytes) -> Sheet:
    return msgspec.msgpack.decode(told, type=Sheet)


def met_in(directory: Path, size: int) -> Any:
    """The store of ranks on one machine: a file, so that no port is open to anybody."""
    from torch import distributed

    stores: Any = distributed  # it does not say that it exports them
    return stores.FileStore(str(directory / "store"), size)


def met_at_master() -> Any:
    """The store of ranks that torchrun started, with its MASTER_ADDR and MASTER_PORT."""
    from torch.distributed.rendezvous import rendezvous

    # rank 0 comes once it has found its coordinator
    store, _, _ = next(rendezvous("env://", timeout=timedelta(days=7)))
    return store


def launched() -> tuple[int, int] | None:
    """This process's rank and how many there are, if torchrun or the like started it."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return None
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return (rank, size) if size > 1 else None


def local_rank() -> int:
    """Of a process that torchrun started: which on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def device_of(device: str, local_rank: int) -> str:
    """The device of one rank: of "cuda" each has its own, as far as there are enough.

    It becomes the thread's current one, where Triton runs its kernels.
    """
    if device != "cuda":
        return device
    from torch import cuda

    index = local_rank % max(1, cuda.device_count())
    if cuda.is_available():  # else loading says what is wrong
        cuda.set_device(index)
    return f"cuda:{index}"


def _read(count: int) -> bytes:
    data = b""
    while len(data) < count:
        if not (piece := os.read(0, count - len(data))):
            raise EOFError
        data += piece
    return data


def _how(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
