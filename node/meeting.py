"""How the ranks of a node come together: in a store, once each has loaded model and data."""

from __future__ import annotations

import platform
import time
from typing import Any

from node.engine import Outcome
from node.group import Group
from node.ranks import POLL_SECONDS, GroupError
from node.shared import SharedOracle
from node.worker import Worker


class Meeting:
    """One rank's side of it.

    Args:
        store: of the ranks, used for nothing before but the sheet.
        rank, size: which of how many.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size

    def come(self, worker: Worker, device: str) -> None:
        """Say what was loaded, and where."""
        self._device = device
        about = f"{worker.space.digest.hex()} {platform.node()} {device}"
        self._store.set(f"about/{self._rank}", about)

    def is_complete(self) -> bool:
        return all(self._store.check([f"about/{rank}"]) for rank in range(self._size))

    def open(self) -> None:
        """Rank 0 has seen all of them: only now does anybody's patience begin."""
        self._store.set("open", "")

    def wait(self) -> None:
        """For rank 0, as long as it takes."""
        while not self._store.check(["open"]):
            time.sleep(POLL_SECONDS)

    def group(self, patience_seconds: float, interface: str, *, deals: bool = False) -> Group:
        """Connect to all others, and with ``deals`` for FSDP too.

        Raises:
            GroupError: a rank is gone, trains other tensors than rank 0, or lacks a GPU.
        """
        abouts = [self._store.get(f"about/{rank}").decode().split() for rank in range(self._size)]
        for rank, (space, *_) in enumerate(abouts):
            if space != abouts[0][0]:
                why = "another model file, or other versions of its libraries"
                raise GroupError(f"rank {rank} trains other tensors than rank 0: {why}")
        places = {(host, device) for _, host, device in abouts}
        has_gpus = all("cuda" in device for _, device in places) and len(places) == self._size
        place = (self._store, self._rank, self._size)
        group = Group(*place, patience_seconds, interface=interface, has_gpus=has_gpus)
        if deals and not has_gpus and "cuda" in self._device:
            raise GroupError("--fsdp on CUDA needs a GPU for each rank")
        if deals:
            from node import fsdp  # few need it, and it takes a while

            with group.noticing():
                group.mesh = fsdp.mesh(*place, self._device, patience_seconds, interface)
        return group


def share(worker: Worker, group: Group) -> Outcome:
    """From now on the worker's local runs are the whole group's; what it has loaded.

    Raises:
        GroupError: a rank is gone, or could not take its part of a model that is dealt.
    """
    if group.mesh is None:
        worker.oracle = SharedOracle(worker.trainee.oracle, group, worker.micro_batch)
        return worker.ready()
    from node import fsdp

    def deal() -> Outcome:
        worker.trainee.deal(group.mesh)
        worker.oracle = fsdp.DealtOracle(worker.trainee.oracle, group, worker.micro_batch)
        return worker.ready()

    return fsdp.in_step(group, deal)  # a dealt model infers on all ranks or none
