"""What the ranks of a node say to each other: orders of rank 0, a few numbers, sums of vectors.

Every rank does the same job and asks the same of the others in the same order.  An
*exchange* of numbers also tells that a rank has failed, so that all leave the job at one
place and the group lives on.  When a rank is gone or silent the group is broken for good.

Process groups of our own and not torch's default one: that exists once in a process, and
a node makes a new group after each death.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import distributed

from node.ranks import GroupError, RankError
from protocol.wire import Frame

VALUES, END, FAILED = 0.0, 1.0, 2.0  # what a record is
ROOM = 62  # numbers that travel with it; more take a second message
TEXT_BYTES = 500
CHUNK = 64 << 20  # bytes of an order's data that are held twice


class Group:
    """One rank's end of a group.

    Args:
        store: where the ranks find each other; nothing else has used it for a group.
        rank, size: which of how many.
        patience_seconds: how long one may keep the others waiting.
        interface: of the network, "lo" within a machine; "" is gloo's choice.
        has_gpus: each rank has a CUDA device of its own: vectors are summed by NCCL.

    Attributes:
        is_broken: a rank is gone; everything raises ``GroupError`` from then on.
        mesh: of the ranks, where the model is dealt among them.
    """

    mesh: Any = None

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        patience_seconds: float,
        *,
        interface: str = "",
        has_gpus: bool = False,
    ) -> None:
        self.rank, self.size, self.is_broken = rank, size, False
        self._has_left = False  # a job that failed
        limit = timedelta(seconds=patience_seconds)
        self._gloo: Any = None
        self._nccl: Any = None
        with self.noticing():
            self._gloo = _gloo(store, rank, size, limit, interface)
            if has_gpus:
                self._nccl = _nccl(store, rank, size, limit)

    # --- a job -------------------------------------------------------------------

    def exchange(
        self, mine: Sequence[float], error: Exception | None = None, kind: float = VALUES
    ) -> list[list[float]]:
        """The numbers of all ranks, by rank; each may bring another count of them.

        Args:
            mine: this rank's.
            error: why this rank cannot go on, in place of numbers.
            kind: of the record.

        Raises:
            Exception: ``error``, once the others know.
            RankError: another rank cannot go on.
            GroupError: a rank is gone, or not at this place of the job.
        """
        kind = kind if error is None else FAILED
        rows = self._gathered([kind, len(mine), *mine[:ROOM]], 2 + ROOM)
        failed = [rank for rank, row in enumerate(rows) if row[0] == FAILED]
        if failed:
            self._has_left = True
            reason = self._told(failed[0], "" if error is None else said(error))
            raise error or RankError(f"rank {failed[0]}: {reason}")
        if any(row[0] != kind for row in rows):
            self.is_broken = True
            raise GroupError("the ranks are not at the same place of a job")
        if (most := max(int(row[1]) for row in rows)) > ROOM:
            rows = self._gathered([kind, len(mine), *mine], 2 + most)
        return [row[2 : 2 + int(row[1])] for row in rows]

    def sum_(self, x: torch.Tensor) -> None:
        """Replace a vector by the sum over the ranks, in its precision: the same bits on all.

        Both libraries add in an order that the number of ranks and the length alone
        decide, and hand round what one rank has added up.
        """
        with self.noticing():
            if self._nccl is not None and x.is_cuda:
                self._nccl.allreduce([x]).wait()
                return
            here = x.cpu()
            self._gloo.allreduce([here]).wait()
            if here is not x:
                x.copy_(here)

    def end(self, mine: Sequence[float], error: Exception | None = None) -> list[list[float]]:
        """Leave a job: what each rank reports of it; nothing after one that all left before.

        Raises:
            Exception: as of ``exchange``.
        """
        return [] if self._has_left else self.exchange(mine, error, END)

    # --- orders ------------------------------------------------------------------

    def send(self, *frames: Frame | None) -> None:
        """To all others; a job begins with it.

        Raises:
            GroupError: a rank is gone.
        """
        self._has_left = False
        with self.noticing():
            self._cast(torch.tensor([len(frames)]))
            self._cast(torch.tensor([-1 if f is None else len(f) for f in frames]))
            for frame in frames:
                for at in range(0, len(frame or b""), CHUNK):
                    piece = np.frombuffer(memoryview(frame or b"")[at : at + CHUNK], np.uint8)
                    self._cast(torch.from_numpy(piece.copy()))

    def receive(self) -> list[bytearray | None]:
        """What rank 0 sends.

        Raises:
            GroupError: it is gone, or has not sent anything for too long.
        """
        self._has_left = False
        with self.noticing():
            count, frames = torch.zeros(1, dtype=torch.int64), []
            self._cast(count)
            sizes = torch.zeros(int(count), dtype=torch.int64)
            self._cast(sizes)
            for size in sizes.tolist():
                frames.append(None if size < 0 else bytearray(size))
                for at in range(0, size, CHUNK):
                    part = memoryview(frames[-1] or b"")[at : at + CHUNK]
                    self._cast(torch.frombuffer(part, dtype=torch.uint8))
            return frames

    # --- gloo --------------------------------------------------------------------

    def _cast(self, x: torch.Tensor, root: int = 0) -> None:
        self._gloo.broadcast(x, root).wait()

    def _gathered(self, mine: Sequence[float], length: int) -> list[list[float]]:
        record = torch.zeros(length, dtype=torch.float64)
        record[: len(mine)] = torch.tensor(mine, dtype=torch.float64)
        rows = [torch.empty_like(record) for _ in range(self.size)]
        with self.noticing():
            self._gloo.allgather([rows], [record]).wait()
        return [row.tolist() for row in rows]

    def _told(self, by: int, text: str) -> str:
        raw = text.encode()[:TEXT_BYTES].ljust(TEXT_BYTES, b"\0")
        buffer = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        with self.noticing():
            self._cast(buffer, by)
        return bytes(buffer.tolist()).rstrip(b"\0").decode(errors="replace")

    def noticing(self) -> _Noticing:
        """What talks to other ranks: its errors are ``GroupError``, and end the group."""
        if self.is_broken:
            raise GroupError("the group is broken")
        return _Noticing(self)


class _Noticing:
    """Turns what the libraries raise into ``GroupError``, and marks the group."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError):
            self._group.is_broken = True
            raise GroupError(f"a rank is gone or silent: {_plain(error)}") from error


def gathered(group: Group, compute: Callable[[], Sequence[float]]) -> list[float]:
    """What the ranks computed, rank after rank; a fault on any of them is one on all."""
    try:
        mine = compute()
    except (GroupError, RankError):
        raise  # the others know
    except Exception as error:
        group.exchange([], error)  # raises it
        raise
    return [value for row in group.exchange(mine) for value in row]


def said(error: Exception) -> str:
    """One line of an error, for other ranks and for people."""
    if isinstance(error, RankError):
        return str(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _plain(error: BaseException) -> str:
    """A message of gloo's without its place in the source and its advice."""
    text = (str(error).splitlines() or [""])[0]
    return re.sub(r"^\[[^]]*\.cc:\d+\] ", "", text).partition(". This")[0][:200]


def _gloo(store: Any, rank: int, size: int, limit: timedelta, interface: str) -> Any:
    gloo: Any = distributed.ProcessGroupGloo
    if not interface:
        return gloo(store, rank, size, limit)
    options = gloo._Options()
    options._timeout, options._devices = limit, [gloo.create_device(interface=interface)]
    return gloo(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int, limit: timedelta) -> Any:
    # wait() raises after the limit; else a watchdog would end the process, rank 0's too
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    stores: Any = distributed  # it does not say that it exports them
    nccl: Any = distributed.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = limit
    return nccl(stores.PrefixStore("nccl", store), rank, size, options)
