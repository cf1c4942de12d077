"""A model whose frozen weights are dealt among the ranks of a group, by torch's FSDP2.

Each rank keeps a part of every block.  A pass gathers the weights of one block, and lets go
of them behind it; what is trained, and what is outside of the blocks, each rank has
whole.  So FSDP has nothing to reduce: gradients go the way of ``node.shared``.

A pass needs all ranks at the same place.  So each does as many passes as the one with the
most, and a fault inside of a pass is the end of the group.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fedalgos.method import Batch, Vector
from node import layout
from node.group import Group, said
from node.ranks import GroupError
from node.shared import Ranges, SharedOracle, span
from protocol.errors import ModelError
from protocol.noise import Direction

T = TypeVar("T")


def check(model: nn.Module) -> None:
    """See that there is something to deal.

    Raises:
        ModelError: nothing of the model is both in a block and frozen.
    """
    if not _dealt(model):
        raise ModelError("--fsdp deals frozen weights of a model's blocks; here there are none")


def _dealt(model: nn.Module) -> set[int]:
    """The ids of the parameters that each rank keeps a part of."""
    blocks = layout.blocks(model).values()
    return {id(p) for block in blocks for p in block.parameters() if not p.requires_grad}


def mesh(
    store: Any, rank: int, size: int, device: str, patience_seconds: float, interface: str
) -> DeviceMesh:
    """The ranks as FSDP wants them, on torch's default process group, one after another in time.

    Args:
        store: where the ranks find each other.
        rank: of this one.
        size: how many they are.
        device: of this rank; on CUDA each has its own.
        patience_seconds: how long one may keep the others waiting.
        interface: of the network; "" is gloo's choice.
    """
    if distributed.is_initialized():  # of the group before, which is broken
        distributed.destroy_process_group()
    if interface:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    kind = torch.device(device).type
    stores: Any = distributed  # it does not say that it exports them
    distributed.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=stores.PrefixStore("fsdp", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=patience_seconds),
    )
    return init_device_mesh(kind, (size,))


def deal(model: nn.Module, mesh: DeviceMesh, device: str) -> None:
    """Leave each rank its part of the frozen weights of every block, and move it to the device.

    Until then all of the model is in the machine's memory: its parts are tried out one by one,
    and it is run on a few tokens, which takes that it is in one place.
    """
    place(model, device)
    for block in layout.blocks(model).values():
        trained = {p for p in block.parameters() if p.requires_grad}
        # each is a root of its own: how the model gets from one to the next is its own affair
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    for p in model.parameters():
        if not p.requires_grad and not isinstance(p, DTensor) and p.device.type == "cpu":
            p.data = p.data.clone()  # the file it was read from stays in memory as long as it does


def place(model: nn.Module, device: str) -> None:
    """Move all to the device but what is dealt, which gets there block by block."""
    later, whole = _dealt(model), cast("Any", model)  # its types lack this
    whole._apply(lambda tensor: tensor if id(tensor) in later else tensor.to(device))


def in_step(group: Group, compute: Callable[[], T]) -> T:
    """What ``compute`` gives, whose passes take all ranks.

    Raises:
        RankError: another rank cannot go on, and has said so before it began.
        GroupError: a rank is gone, or failed inside of a pass: the others wait there.
    """
    group.exchange([])  # who cannot go on says so here, not in the middle of a pass
    try:
        return compute()
    except Exception as error:
        group.is_broken = True
        raise GroupError(f"a pass of a dealt model broke off: {said(error)}") from error


class DealtOracle(SharedOracle):
    """Of a dealt model: rows are shared for gradients; all else every rank computes for itself."""

    def loss(self, x: Vector, batch: Batch) -> float:
        return self._in_step(lambda: self._inner.loss(x, batch))

    def losses(
        self, x: Vector, directions: Sequence[Direction], offsets: Sequence[float], batch: Batch
    ) -> list[tuple[float, ...]]:
        def compute() -> list[tuple[float, ...]]:
            # a point by itself: passes that take turns would gather a block twice
            found = [
                [self._inner.losses(x, [direction], [offset], batch)[0][0] for offset in offsets]
                for direction in directions
            ]
            return [tuple(points) for points in found]

        return self._in_step(compute)

    def jvp(
        self, x: Vector, directions: Sequence[Direction], batch: Batch
    ) -> tuple[float, list[float]]:
        return self._in_step(lambda: self._inner.jvp(x, directions, batch))

    def _own_grad(self, x: Vector, batch: Batch, ranges: Ranges | None) -> tuple[float, Vector]:
        start, stop = span(len(batch), self._group)
        most = -(-len(batch) // self._group.size)  # rows of any rank
        idle = self._passes(most) - self._passes(stop - start)

        def compute() -> tuple[float, Vector]:
            found = SharedOracle._own_grad(self, x, batch, ranges)
            for _ in range(idle):
                self._inner.grad(x, batch.rows(0, 1), ranges)  # counts for nothing
            return found

        return self._in_step(compute)

    def _passes(self, rows: int) -> int:
        return -(-rows // (self._micro_batch or rows or 1))

    def _in_step(self, compute: Callable[[], T]) -> T:
        return in_step(self._group, compute)
