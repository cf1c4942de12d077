"""Two ends that say steps and updates to and fro, to be run in network namespaces.

    python -m tests.talk coordinator ROUNDS PAYLOAD MECHANISM BIND
    python -m tests.talk node ROUNDS PAYLOAD MECHANISM ENDPOINT

The coordinator prints its endpoint, and at the end what its kernel has counted.
"""

from __future__ import annotations

import sys

import numpy as np

from benchmarks.doorkeeper import Keys
from protocol.channel import to_coordinator, to_node
from protocol.dealer import Dealer
from protocol.keys import Identity, KeyPair
from protocol.messages import Step, Update
from protocol.payload import Dense, Payload, Run, Scalars, Sparse, encode, spec_of
from protocol.router import Router
from protocol.tcp import Traffic

PATIENCE_SECONDS = 30.0
HELLO = [b"hello"]
SERVER, NODE = KeyPair.of(b"s" * 32), KeyPair.of(b"n" * 32)
KEYS = Keys(SERVER.secret, frozenset({NODE.public}))


def values(count: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.linspace(0.1, 1, count, dtype=np.float32)


PAYLOADS: dict[str, Payload] = {
    "scalar": Scalars((Run(1, 4),), values(4)),
    "sparse": Sparse(75_000, np.arange(0, 75_000, 16), values(4_688)),
    "dense": Dense(values(75_000)),
}


def coordinator(rounds: int, payload: Payload, is_secure: bool, bind: str) -> None:
    step = Step(version=1, round=1, digest=bytes(16), payload=spec_of(payload))
    say = to_node.pack(step, encode(payload))
    router, traffic, done = Router(bind, KEYS if is_secure else None), Traffic(), 0
    print(router.endpoint, flush=True)  # noqa: T201
    while done < rounds:
        got = router.recv(PATIENCE_SECONDS)
        if got is not None:
            router.watch(got[0], "node")
            done += got[1] != HELLO
            router.send(got[0], say if done < rounds else HELLO)
        for growth in router.grown():
            traffic = traffic.plus(growth)
    got = router.recv(PATIENCE_SECONDS)  # the answer to the last: all has arrived
    for growth in router.grown():
        traffic = traffic.plus(growth)
    print(traffic.received, traffic.sent, traffic.connections, flush=True)  # noqa: T201
    router.close()


def node(rounds: int, payload: Payload, is_secure: bool, endpoint: str) -> None:
    spec = spec_of(payload)
    update = Update(round=1, attempt=0, client=1, examples=8, loss=0.5, payload=spec)
    say = to_coordinator.pack(update, encode(payload))
    dealer, done = Dealer(endpoint, Identity(NODE, SERVER.public) if is_secure else None), 0
    dealer.send(HELLO)
    while True:
        frames = dealer.recv(PATIENCE_SECONDS)
        if frames == HELLO:
            break
        if frames is None:
            continue
        done += 1
        if done == rounds // 2:
            dealer.reconnect()
            dealer.send(HELLO)
        else:
            dealer.send(say)
    dealer.send(HELLO)
    dealer.close()


if __name__ == "__main__":
    {"coordinator": coordinator, "node": node}[sys.argv[1]](
        int(sys.argv[2]), PAYLOADS[sys.argv[3]], sys.argv[4] == "curve", sys.argv[5]
    )
