"""How a node gets in: by its own key, which a one-time token can enrol."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from protocol import keys
from protocol.channel import read_refusal, to_node
from protocol.channel import to_coordinator as outward
from protocol.dealer import Dealer
from protocol.errors import KeyRefusedError, KeyStoreError, NetworkError, RefusedError
from protocol.keys import Identity, KeyPair, Token
from protocol.messages import Enroll, Enrolled, Refuse, ToNode
from protocol.wire import RemoteProtocolError, VersionError

log = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0
LINE_BYTES = 4 * keys.KEY_BYTES + 2


@dataclass(frozen=True)
class Admission:
    """What a node was started with.

    Attributes:
        endpoint: the coordinator's.
        name: the node's, and its key's.
        directory: where its keys are.
        token: enrols it where it is not yet.
        give_up_seconds: how long to look for the coordinator; 0 is for ever.
    """

    endpoint: str
    name: str
    directory: Path
    token: Token | None = None
    give_up_seconds: float = 0.0

    def identity(self) -> Identity:
        """The keys at hand; without them, enrols by the token.

        Raises:
            KeyStoreError: a key is missing and there is no token, or one cannot be used.
            RefusedError: as of ``enroll``.
        """
        own, trusted = keys.load(self.directory, self.name), keys.pinned(self.directory)
        if own is not None and trusted is not None:
            return Identity(own, trusted)
        if self.token is not None:
            return self.enroll(self.token)
        lacks = f"no key of {self.name}" if own is None else f"no {keys.COORDINATOR}.pub"
        ways = "start it once with a token (seedwire keys token, at the coordinator)"
        raise KeyStoreError(f"{lacks} in {self.directory}: {ways}, or both sides with --insecure")

    def enroll(self, token: Token) -> Identity:
        """Hand in this node's public key, made if there is none, and trust the coordinator.

        Raises:
            RefusedError: the token or the name is of no use.
            NetworkError: no coordinator for ``give_up_seconds``.
            KeyStoreError: the key cannot be kept.
        """
        if keys.pinned(self.directory) not in (None, token.coordinator):
            keys.pin(self.directory, token.coordinator)  # says what is wrong
        own = keys.load(self.directory, self.name) or keys.make(self.directory, self.name)
        try:
            self._hand_in(own, token)
        except KeyRefusedError as error:
            why = "does not admit this token: used, expired, or another coordinator's"
            raise RefusedError(f"the coordinator at {self.endpoint} {why}") from error
        keys.pin(self.directory, token.coordinator)
        log.info("enrolled as %s with key %s", self.name, own.public[:16])
        return Identity(own, token.coordinator)

    def _hand_in(self, own: KeyPair, token: Token) -> None:
        began = time.monotonic()
        dealer = Dealer(self.endpoint, token.identity)
        try:
            while True:
                dealer.send(outward.pack(Enroll(node=self.name, key=bytes.fromhex(own.public))))
                answer = _answer(dealer)
                if isinstance(answer, Enrolled):
                    return
                if isinstance(answer, Refuse):
                    raise RefusedError(answer.reason)
                away = time.monotonic() - began
                if 0 < self.give_up_seconds < away:
                    raise NetworkError(f"no coordinator at {self.endpoint} for {away:.0f} s")
                dealer.reconnect()
        finally:
            dealer.close()


def _answer(dealer: Dealer) -> ToNode | None:
    """What the coordinator says to an enrolment, or None if it says nothing."""
    until = time.monotonic() + ANSWER_SECONDS
    while (left := until - time.monotonic()) > 0:
        frames = dealer.recv(left)
        if frames is None:
            continue
        try:
            answer, _ = to_node.unpack(frames)
            return answer
        except VersionError as error:
            refusal = read_refusal(frames)
            raise RefusedError(refusal.reason if refusal else str(error)) from error
        except RemoteProtocolError as error:
            log.warning("dropped a message of the coordinator: %s", error)
    return None


def handed_over() -> Identity:
    """Keys from whoever started this process: a line on standard input, which stays open.

    Raises:
        KeyStoreError: it is not such a line.
    """
    line = b""
    while not line.endswith(b"\n") and len(line) < LINE_BYTES and (byte := os.read(0, 1)):
        line += byte
    try:
        secret, coordinator = (bytes.fromhex(word) for word in line.decode("ascii").split())
    except ValueError:
        raise KeyStoreError("--keys - wants a secret key and the coordinator's, in hex") from None
    return Identity(KeyPair.of(secret), coordinator.hex())
