"""From checked options to a session, and how its process ends."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata

from node.admission import Admission
from node.engine import Setup
from node.session import Session
from protocol.errors import KeyRefusedError
from protocol.keys import Identity
from protocol.notify import Notifier
from protocol.process import INTERRUPTED, Stopped

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a node was started with.

    Attributes:
        setup: what it hosts, and how it computes.
        admission: the coordinator, the node's name, where its keys are.
        is_insecure: it does without keys.
        given: keys from whoever started it, instead of those in the directory.
    """

    setup: Setup
    admission: Admission
    is_insecure: bool = False
    given: Identity | None = None


class Life:
    """A node from its login to its goodbye.

    Attributes:
        is_idle: no thread is inside torch, so the interpreter may be unwound.
    """

    def __init__(self, start: Start) -> None:
        self._start, self.is_idle = start, True
        self._notifier = Notifier()

    def live(self) -> None:
        """Take part until the run is over.

        Raises:
            SeedwireError: of ``Admission`` or ``Session``.
        """
        admission = self._start.admission
        if self._start.is_insecure:
            log.warning("--insecure: nothing is encrypted; anybody can read and take part")
            self._session(None)
            return
        try:
            self._session(self._start.given or admission.identity())
        except KeyRefusedError as error:
            if admission.token is None or self._start.given is not None:
                raise KeyRefusedError(f"{error}: {mending(admission)}") from error
            self._session(admission.enroll(admission.token))

    def _session(self, identity: Identity | None) -> None:
        it, software = self._start.admission, metadata.version("seedwire")
        setup, wait = self._start.setup, it.give_up_seconds
        session = Session(
            it.endpoint, it.name, software, setup, wait, identity=identity, notifier=self._notifier
        )
        reason = ""
        try:
            session.run()
        except BaseException as error:
            why = "stopped" if isinstance(error, Stopped) else "an error"
            reason = f"{why} on this side"
            raise
        finally:
            self.is_idle = session.leave(reason)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """End the process by the exit code that comes out of here."""
        code = 0
        try:
            yield
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            code = 0 if code == INTERRUPTED else code  # told to leave, and left: nothing is wrong
            if self.is_idle:
                raise SystemExit(code) from end
        if not self.is_idle:  # a thread is inside torch: the interpreter cannot be unwound
            sys.stderr.flush()
            os._exit(code)


def mending(admission: Admission) -> str:
    """What to do about a key that the coordinator does not admit."""
    public = admission.directory / f"{admission.name}.pub"
    return f"it was revoked, or {public} is not enrolled there yet (seedwire keys enroll, or token)"
