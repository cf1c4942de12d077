"""What a round costs where nothing is computed: time, bytes, memory, beside bare pyzmq.

    python -m benchmarks.round

A coordinator and three nodes (one of them evaluates) in processes of their own, over
loopback with CURVE, through the real journal, desk, session and worker; the model is a
vector.  Scalars are one up from each of two nodes and four down to them, dense payloads
1.2 M fp32 each way.  The bare loop echoes the same payloads with neither protocol nor keys.
Time on a busy machine says little: CPU per round, of all processes, stands beside it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import psutil
import zmq

from benchmarks.harness import Metric, no_arguments, progress, report
from benchmarks.peers import KEYS, SECRETS
from protocol import experiment as experiments

NODES, ROUNDS, DENSE_ROUNDS, DENSE, IDLE_SECONDS = 2, 200, 24, 1_200_000, 12.0
WARM_UP, LOOK_SECONDS = 3, 0.05
ROUND = '"train_loss"'  # in the line of each round that is done, and in no other
TABLE: dict[str, Any] = {
    "run": {"name": "round", "seed": 1},
    "model": {"id": "none"},
    "data": {"id": "none", "task": "classify"},
    "partition": {"clients": NODES},
    "nodes": {},
}
SCALAR = TABLE | {
    "method": {"name": "fedkseed", "candidates": 4, "steps": 1, "batch_size": 1, "lr": 0.1},
    "rounds": {"count": ROUNDS, "evaluate_every": ROUNDS},
}
WHOLE = TABLE | {
    "method": {"name": "fedavg", "steps": 1, "batch_size": 1, "local": {"kind": "sgd", "lr": 0.1}},
    "rounds": {"count": DENSE_ROUNDS, "evaluate_every": DENSE_ROUNDS},
}


def start(role: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "benchmarks.peers", role, *arguments])


# --- what is measured ------------------------------------------------------------


@dataclass(frozen=True)
class Rounds:
    """Medians over the rounds but the first ones, which warm up.

    Attributes:
        shortest: milliseconds of the round that others disturbed least.
        cpu_ms: of the coordinator per round, and of one node.
        tcp: bytes per client and round, both ways.
        own_over_kernel: message bytes over TCP bytes of the whole run, the worse way.
        rss_mb: the coordinator's resident peak.
    """

    milliseconds: float
    shortest: float
    cpu_ms: tuple[float, float]
    tcp: float
    own_over_kernel: float
    rss_mb: float


def rounds(table: dict[str, Any], size: int) -> Rounds:
    """A run from its start to its end."""
    with tempfile.TemporaryDirectory() as folder:
        directory, peak = Path(folder), 0
        coordinator = start("coordinator", folder, json.dumps(table))
        announced = directory / "coordinator.json"
        while not announced.exists():
            if coordinator.poll() is not None:
                raise RuntimeError("the coordinator did not start")
            time.sleep(0.05)
        endpoint = json.loads(announced.read_text())["endpoint"]
        names = [name for name in SECRETS if name != "coordinator"]
        nodes = [start("node", endpoint, name, str(size)) for name in names]
        both = psutil.Process(coordinator.pid), psutil.Process(nodes[0].pid)
        looks: list[tuple[int, list[float]]] = []  # rounds done, and CPU milliseconds so far
        while coordinator.poll() is None:
            with contextlib.suppress(psutil.Error):
                peak = max(peak, both[0].memory_info().rss)
                looks.append((_num_done(directory), [_cpu_ms(process) for process in both]))
            time.sleep(LOOK_SECONDS)
        for node in nodes:
            node.wait(30)
        text = (directory / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines() if ROUND in line]
        summary = json.loads((directory / "summary.json").read_text())
    looks = [look for look in looks if WARM_UP <= look[0] < len(lines)]
    (first, before), (last, after) = looks[0], looks[-1]
    lines = lines[WARM_UP:]
    tcp = [line["bytes"]["tcp_up"] + line["bytes"]["tcp_down"] for line in lines]
    ratios = summary["own_over_kernel"].values()
    return Rounds(
        1e3 * statistics.median(line["seconds"] for line in lines),
        1e3 * min(line["seconds"] for line in lines),
        ((after[0] - before[0]) / (last - first), (after[1] - before[1]) / (last - first)),
        statistics.median(b - a for a, b in itertools.pairwise(tcp)) / NODES,
        max(ratios, key=lambda ratio: abs(ratio - 1)),
        peak / 1e6,
    )


def _num_done(directory: Path) -> int:
    """How many rounds are; to look at them closely takes time from what is measured."""
    path = directory / "metrics.jsonl"
    return path.read_text().count(ROUND) if path.exists() else 0


def _cpu_ms(process: psutil.Process) -> float:
    """All its threads', in its own code and in the kernel."""
    times = process.cpu_times()
    return 1e3 * float(times.user + times.system)


def idle_bytes_per_second() -> float:
    """Of two nodes that have nothing to do, each, both ways."""
    from coordinator.arrivals import LoggedIn
    from coordinator.desk import Desk
    from coordinator.roster import Roster
    from protocol.experiment import Nodes
    from protocol.messages import Welcome
    from protocol.router import Router

    router = Router("tcp://127.0.0.1:*", KEYS)
    roster = Roster(NODES, metadata.version("seedwire"))
    desk = Desk(router, roster, Nodes(), time.monotonic)
    nodes = [start("node", router.endpoint, f"node-{i}", "8") for i in range(NODES)]

    def turn() -> None:
        for arrival in desk.receive(0.1):
            if isinstance(arrival, LoggedIn):
                table = msgspec.to_builtins(experiments.convert(SCALAR, "round"))
                desk.send(arrival.member, Welcome(run="idle", experiment=table))
        desk.keep_alive()

    def total() -> int:
        desk.measure()
        return sum(t.sent + t.received for t in desk.meter.traffic.values())

    try:
        while sum(key.kind == "model" for key in desk.meter.message) < NODES:  # all are ready
            turn()
        before, since = total(), time.monotonic()
        while time.monotonic() < since + IDLE_SECONDS:
            turn()
        return (total() - before) / (time.monotonic() - since) / NODES
    finally:
        desk.dismiss("measured", finished=True)
        for node in nodes:
            node.wait(30)
        router.close()


def bare(nbytes: int, repeats: int) -> float:
    """Milliseconds of a round trip with two echoing processes, without keys or protocol."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        echoes = [start("echo", str(port), str(repeats)) for _ in range(NODES)]
        peers = [router.recv_multipart()[0] for _ in echoes]
        data, taken = bytes(nbytes), []
        for _ in range(repeats):
            begin = time.perf_counter()
            for peer in peers:
                router.send_multipart([peer, data], copy=False)
            for _ in peers:
                router.recv_multipart(copy=False)
            taken.append(time.perf_counter() - begin)
        for echo in echoes:
            echo.wait(30)
    return 1e3 * statistics.median(taken)


def main() -> None:
    no_arguments(__doc__)
    progress("scalar rounds")
    scalar = rounds(SCALAR, 8)
    progress("dense rounds")
    dense = rounds(WHOLE, DENSE)
    progress("idle")
    idle = idle_bytes_per_second()
    progress("bare pyzmq")
    report(
        "round",
        {
            "scalar_round_ms": Metric(scalar.milliseconds, "ms", "lower", 5.0),
            "scalar_shortest_ms": Metric(scalar.shortest, "ms", "lower"),
            "scalar_coordinator_cpu_ms": Metric(scalar.cpu_ms[0], "ms", "lower"),
            "scalar_node_cpu_ms": Metric(scalar.cpu_ms[1], "ms", "lower"),
            "scalar_bare_ms": Metric(bare(16, 200), "ms", "lower"),
            "scalar_tcp_bytes": Metric(scalar.tcp, "bytes", "lower", 600.0),
            "scalar_own_over_kernel": Metric(scalar.own_over_kernel, "ratio", "higher", 0.99),
            "dense_round_ms": Metric(dense.milliseconds, "ms", "lower", 100.0),
            "dense_shortest_ms": Metric(dense.shortest, "ms", "lower"),
            "dense_coordinator_cpu_ms": Metric(dense.cpu_ms[0], "ms", "lower"),
            "dense_node_cpu_ms": Metric(dense.cpu_ms[1], "ms", "lower"),
            "dense_bare_ms": Metric(bare(4 * DENSE, 10), "ms", "lower"),
            "dense_tcp_bytes": Metric(dense.tcp, "bytes", "lower", 9.65e6),
            "dense_own_over_kernel": Metric(dense.own_over_kernel, "ratio", "higher", 0.99),
            "coordinator_rss_mb": Metric(scalar.rss_mb, "MB", "lower", 80.0),
            "coordinator_dense_rss_mb": Metric(dense.rss_mb, "MB", "lower"),
            "idle_bytes_per_s": Metric(idle, "bytes/s", "lower", 50.0),
        },
    )


if __name__ == "__main__":
    main()
