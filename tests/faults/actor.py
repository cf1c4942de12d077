"""In the process: says where it is, waits for the director's word, does what it is told."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from protocol import meter, payload
from protocol.channel import Channel, to_coordinator, to_node
from protocol.dealer import Dealer
from protocol.messages import Beat, Message, Update
from protocol.router import Router
from protocol.wire import Frame, Peer, RemoteProtocolError

Frames = Sequence[Frame]
Send = Callable[[Frames], bool]


class Actor:
    """This process.

    Args:
        address: the director's socket.
        who: what the script calls this process.
    """

    def __init__(self, address: str, who: str) -> None:
        self._address, self._who = address, who
        self._round = 0
        self._held: Callable[[], bool] | None = None
        self._hoard: list[bytes] = []

    def at(self, phase: str) -> set[str]:
        """Say that a phase is reached; returns what to do to the message at hand."""
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(self._address)
            where = {"who": self._who, "pid": os.getpid(), "round": self._round, "phase": phase}
            line.sendall(json.dumps(where).encode() + b"\n")
            told = line.makefile().readline()
        if not told:
            os._exit(1)  # the director is gone, and so is the test
        orders: dict[str, float] = json.loads(told)
        if "jump" in orders:
            _shift_clock(orders["jump"])
        if "hoard" in orders:
            self._hoard.append(b"\1" * int(orders["hoard"]))  # not zeros: every page is written
        if "miscount" in orders:
            _miscount(int(orders["miscount"]))
        return set(orders)

    def send(self, channel: Channel[Any], frames: Frames, send: Send) -> bool:
        """Send a message, or what the director makes of it."""
        message = self._read(channel, frames)
        if message is None:
            return send(frames)
        name = type(message).__name__.lower()
        orders = self.at(f"send {name}")
        if "poison" in orders:
            frames = _poisoned(message, frames)
        if "reorder" in orders:
            self._held = lambda: send(frames)
            return True
        is_sent = send(frames)
        if "duplicate" in orders:
            send(frames)
        if self._held is not None:
            held, self._held = self._held, None
            held()
        self.at(f"sent {name}")
        return is_sent

    def received(self, channel: Channel[Any], frames: Frames) -> None:
        """Say what has arrived, before anything is made of it."""
        message = self._read(channel, frames)
        if message is not None:
            self.at(f"got {type(message).__name__.lower()}")

    def _read(self, channel: Channel[Any], frames: Frames) -> Message | None:
        try:
            message, _ = channel.unpack([bytes(frame) for frame in frames])
        except RemoteProtocolError:
            return None
        self._round = max(self._round, getattr(message, "round", 0))
        return None if isinstance(message, Beat) else message


def dealer(actor: Actor) -> type[Dealer]:
    """A node's socket with an actor at it."""

    class Acted(Dealer):
        def send(self, frames: Frames) -> bool:
            return actor.send(to_coordinator, frames, super().send)

        def recv(self, within_seconds: float) -> list[bytes] | None:
            frames = super().recv(within_seconds)
            if frames is not None:
                actor.received(to_node, frames)
            return frames

    return Acted


def router(actor: Actor) -> type[Router]:
    """The coordinator's socket with an actor at it."""

    class Acted(Router):
        def send(self, peer: Peer, frames: Frames) -> bool:
            whole = super().send
            return actor.send(to_node, frames, lambda some: whole(peer, some))

        def recv(self, within_seconds: float) -> tuple[Peer, list[bytes]] | None:
            got = super().recv(within_seconds)
            if got is not None:
                actor.received(to_coordinator, got[1])
            return got

    return Acted


def _poisoned(message: Message, frames: Frames) -> Frames:
    """An update whose every value is NaN, in the coding that it came in."""
    assert isinstance(message, Update)
    assert message.payload is not None
    value = payload.decode(message.payload, frames[-1])
    poison = replace(value, values=np.full_like(value.values, np.nan))
    return [*frames[:-1], payload.encode(poison)]


def _shift_clock(seconds: float) -> None:
    """As somebody sets the date: the monotonic clock knows nothing of it."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)


def _miscount(nbytes: int) -> None:
    """Frames that seem longer than they are, as of framing that was understood wrong."""
    whole = meter.zmtp_bytes
    meter.zmtp_bytes = lambda size, mechanism="null": whole(size, mechanism) + nbytes


def die_with_parent() -> None:
    """End this process when the one that started it is gone, however that came about."""
    from multiprocessing import parent_process

    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
