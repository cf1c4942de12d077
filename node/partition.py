"""Dealing: which rows of the training examples each client gets.

The partitioners are those of ``flwr-datasets``, or equal to them, so that splits mean what they
mean elsewhere.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from protocol.errors import DataError
from protocol.experiment import Partition

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

Indices = npt.NDArray[np.int64]

_REDRAWS = 20  # of 11 draws each, before a Dirichlet split is called impossible


def deal(
    labels: Indices, owners: list[str] | None, partition: Partition, clients: Collection[int]
) -> dict[int, Indices]:
    """Row numbers of each client asked for.

    Args:
        labels: class numbers of the training examples.
        owners: values of the natural column, if that is how they are dealt.
        partition: how.
        clients: whose rows to return; does not change them.

    Raises:
        DataError: the split is impossible, or leaves a client asked for without examples.
    """
    if partition.kind != "natural" and len(labels) < partition.clients:
        raise DataError(
            f"{len(labels)} training examples are too few for partition.clients {partition.clients}"
        )
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their progress bar, and a page on each redraw
        shard = _partition(labels, owners, partition)
        if outside := [client for client in clients if not 0 <= client < partition.clients]:
            raise DataError(f"client {min(outside)} does not exist: there are {partition.clients}")
        dealt = {client: shard(client) for client in sorted(clients)}
    for client, rows in dealt.items():
        if len(rows) == 0:
            raise DataError(
                f"client {client} has no examples: lower partition.clients, or raise "
                "data.train or partition.alpha"
            )
    return dealt


def _partition(
    labels: Indices, owners: list[str] | None, partition: Partition
) -> Callable[[int], Indices]:
    """A function from client to row numbers."""
    count, rows = partition.clients, np.arange(len(labels))
    if partition.kind == "iid":
        # The shuffle is ours, so that partition.seed counts.  Flower's partitioner would cut in
        # order, too, but to import it takes each node 90 MB and two seconds.
        order = np.random.Generator(np.random.Philox(partition.seed)).permutation(len(labels))
        return np.array_split(order, count).__getitem__
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read when the package is imported
    import datasets
    from flwr_datasets import partitioner as flower

    def shares(dealer: Partitioner) -> Callable[[int], Indices]:
        columns: dict[str, Any] = {"row": rows, "label": labels}
        if owners is not None:
            columns["owner"] = owners
        dealer.dataset = datasets.Dataset.from_dict(columns)
        return lambda client: np.array(dealer.load_partition(client)["row"], dtype=np.int64)

    if partition.kind == "shard":
        dealer = flower.ShardPartitioner(
            count, "label", num_shards_per_partition=partition.shards, seed=partition.seed
        )
        if count * partition.shards > len(labels):
            raise DataError(
                f"{len(labels)} training examples do not fill {count} x {partition.shards} "
                "shards: lower partition.shards or partition.clients"
            )
        return shares(dealer)
    if partition.kind == "dirichlet":
        return _dirichlet(shares, partition)
    return _natural(shares(flower.NaturalIdPartitioner("owner")), owners or [], count)


def _dirichlet(
    shares: Callable[[Partitioner], Callable[[int], Indices]], partition: Partition
) -> Callable[[int], Indices]:
    """Flower gives up after 11 draws, which small alphas often need; then draw again."""
    from flwr_datasets.partitioner import DirichletPartitioner

    for attempt in range(_REDRAWS):
        words = np.random.SeedSequence([partition.seed, attempt]).generate_state(1)
        shard = shares(
            DirichletPartitioner(
                partition.clients,
                "label",
                partition.alpha,
                min_partition_size=partition.min_size,
                seed=int(words[0]) if attempt else partition.seed,
            )
        )
        with contextlib.suppress(ValueError):
            shard(0)
            return shard
    raise DataError(
        f"no Dirichlet split gives all {partition.clients} clients {partition.min_size} examples: "
        "raise partition.alpha, or lower partition.min_size or partition.clients"
    )


def _natural(
    shard: Callable[[int], Indices], owners: list[str], count: int
) -> Callable[[int], Indices]:
    """The ``count`` owners with the most examples, ties by id."""
    names, sizes = np.unique(np.array(owners), return_counts=True)
    if count > len(names):
        raise DataError(
            f"the partition column has {len(names)} values among the training examples, "
            f"fewer than partition.clients {count}"
        )
    # Flower numbers owners in sorted order, as np.unique does.
    largest = sorted(range(len(names)), key=lambda i: (-sizes[i], i))
    return lambda client: shard(largest[client])
