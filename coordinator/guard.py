"""The guard at the coordinator's door: whose key is admitted, and who was turned away.

It is asked in the thread of ``protocol.zap`` and by the loop, and rereads the list of
enrolled keys when that has changed, so that revoking works on a running coordinator.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from coordinator import enrolled
from coordinator.enrolled import Enrolled
from protocol.errors import KeyStoreError
from protocol.keys import Identity, KeyPair
from protocol.messages import Hello, Refuse

log = logging.getLogger(__name__)

LOG_SECONDS = 1.0  # between two lines of one reason: a flood of strangers fills no disk


class Guard:
    """Implements ``protocol.router.Doorkeeper``.

    Args:
        directory: where the keys are; None does without (``--insecure``).
        now: seconds since 1970, for tokens that expire.

    Attributes:
        refused: who was turned away, by reason (docs/errors.md, section 4).

    Raises:
        KeyStoreError: the keys cannot be used.
    """

    def __init__(self, directory: Path | None, now: Callable[[], float] = time.time) -> None:
        self._directory, self._now = directory, now
        self._lock = threading.Lock()
        self._logged: dict[str, float] = {}
        self._seen: tuple[int, ...] | None = None  # of the list's file, as it was last read
        self._enrolled = Enrolled()
        self._made: dict[str, str] = {}  # key -> name, for this process alone
        self._names: dict[str, str] = {}
        self.refused: Counter[str] = Counter()
        self._own = None if directory is None else enrolled.own_pair(directory)
        if directory is not None:
            enrolled.read(directory)  # a damaged list is an error here, later a line in the log
            self.reread()

    @property
    def is_open(self) -> bool:
        """Whether anybody may connect, without a key."""
        return self._own is None

    @property
    def secret(self) -> bytes | None:
        return None if self._own is None else self._own.secret

    @property
    def expects_nobody(self) -> bool:
        """Whether no key is enrolled and no token could enrol one."""
        return not self._enrolled.nodes and not any(
            self._enrolled.fault_of(token, self._now()) is None for token in self._enrolled.tokens
        )

    # --- at the door -------------------------------------------------------------

    def admits(self, key: str, address: str) -> bool:
        self.reread()
        if key in self._names:
            return True
        reason = self._enrolled.fault_of(key, self._now())
        if reason is not None:
            reason = "revoked key" if key in self._enrolled.revoked else reason
            self.refuse(reason, f"{key[:16]} from {address}")
        return reason is None

    def turned_away(self, reason: str) -> None:
        self.refuse(reason, "somebody")

    def refuse(self, reason: str, who: str) -> None:
        """Count somebody who does not get in, and log it, though not more than once a second."""
        with self._lock:
            self.refused[reason] += 1
            count, now = self.refused[reason], time.monotonic()
            if now < self._logged.get(reason, -LOG_SECONDS) + LOG_SECONDS:
                return
            self._logged[reason] = now
        log.warning("refused %s: %s (%d so far)", who, reason, count)

    # --- inside ------------------------------------------------------------------

    def name_of(self, key: str) -> str | None:
        """The name that a key is enrolled under; None of a token's, and once it is revoked."""
        return self._names.get(key)

    def fault_of(self, key: str, hello: Hello) -> Refuse | None:
        """Why this key may not log in like that, or None."""
        name = self._names.get(key)
        if self.is_open or (name == hello.node and not self._is_usurper(key, hello)):
            return None
        self.refuse("another's name", f"{name} as {hello.node}, to {hello.role}")
        why = f"this key is enrolled as {name}, not as {hello.node}: start it with --name {name}"
        if name == hello.node:
            why = "the coordinator has an evaluator of its own: start it with --no-evaluator"
        return Refuse(code="key", reason=why)

    def _is_usurper(self, key: str, hello: Hello) -> bool:
        """Whether somebody else's evaluator would bring the parameters."""
        return hello.role == "evaluate" and key not in self._made and bool(self._made)

    def is_token(self, key: str) -> bool:
        """Whether the bearer of this key may do nothing but enrol."""
        return key in self._enrolled.tokens

    def redeem(self, token: str, name: str, key: str) -> str | None:
        """Enrol a node by its token; returns why not."""
        assert self._directory is not None  # noqa: S101 - else nobody has a key
        try:
            enrolled.change(self._directory, lambda now: now.redeem(token, name, key, self._now()))
        except KeyStoreError as error:
            return str(error)
        self.reread()
        log.info("enrolled %s with key %s", name, key[:16])
        return None

    def make(self, name: str) -> Identity | None:
        """A key pair that is admitted as long as this process lives, and lies nowhere."""
        if self._own is None:
            return None
        pair = KeyPair.new()
        self._made[pair.public] = name
        self._names = {**self._names, pair.public: name}
        return Identity(pair, self._own.public)

    def reread(self) -> None:
        """Take the list as it is on disk, if it has changed; a damaged one changes nothing."""
        if self._directory is None:
            return
        with self._lock:
            try:
                found = os.stat(enrolled.path_of(self._directory))
                seen: tuple[int, ...] = (found.st_mtime_ns, found.st_ino, found.st_size)
            except OSError:
                seen = ()  # there is none
            if seen == self._seen:
                return
            try:
                self._enrolled = enrolled.read(self._directory)
            except KeyStoreError as error:
                log.error("%s; going on with the keys as they were", error)
            self._seen = seen
            self._names = {key: name for name, key in self._enrolled.nodes.items()} | self._made
