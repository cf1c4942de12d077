"""``seedwire cluster push``: what is missing on a host crosses, once, and is put in place whole."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from deploy.cargo import Cargo
from deploy.errors import HostError
from deploy.install import install, prepare, probe
from deploy.machine import Office
from deploy.parallel import Outcome, Say, each
from deploy.receive import INCOMING
from deploy.ssh import Remote

RECEIVE = (Path(__file__).parent / "receive.py").read_text()
CHECK_SECONDS = 1800.0  # everything is read, from an SD card
COPY_SECONDS = 24 * 3600.0
SPARE_BYTES = 50_000_000


def push_all(
    hosts: Sequence[Remote],
    cargo: Cargo,
    office: Office | None,
    fresh: bool = False,
    console: Console | None = None,
) -> Outcome[None]:
    """Bring the cargo to hosts; then, where that went well, have them admitted.

    Args:
        hosts: from ``remotes``.
        cargo: what each of them gets.
        office: the coordinator's, which may be on one of the hosts; None is without keys.
        fresh: whether to make the venvs anew.
        console: where the lines of progress go.
    """
    outcome = each(hosts, lambda remote, say: push(remote, cargo, say, fresh), console)
    for remote in hosts:
        if office is not None and remote.host.name in outcome.done:
            try:
                office.admit(remote)
            except HostError as error:
                outcome.failed[remote.host.name] = error
    return outcome


def push(remote: Remote, cargo: Cargo, say: Say, fresh: bool = False) -> None:
    """Bring the cargo to a host and install it there.

    Raises:
        HostError: saying what to do.
    """
    copied = bring(remote, cargo, say)
    torch = install(remote, cargo, say, fresh)
    say("looking whether all is there")
    prepare(remote, cargo)
    say(f"ready: {copied}, {torch}")


def bring(remote: Remote, cargo: Cargo, say: Say) -> str:
    """Copy what the host lacks; returns how much that was, in words.

    A copy that was cut off is resumed where it ended.

    Raises:
        HostError: the host cannot be reached, has no room, or a file changed meanwhile.
    """
    say("comparing")
    found = _receive(remote, "check", cargo)
    lacking: list[str] = found["lacking"]
    size, sent = cargo.size(lacking), 0
    if size + SPARE_BYTES > found["free"]:
        free, wanted = _megabytes(found["free"]), _megabytes(size + SPARE_BYTES)
        raise HostError(f"{free} free in {remote.host.directory}, want {wanted}: make room there")
    if lacking:
        say(f"copying {_megabytes(size)}")
        sent = _copy(remote, cargo, lacking)
    if found["open"]:
        say("putting it in place")
        if left := _receive(remote, "place", cargo)["lacking"]:
            raise HostError(f"{left[0]} did not arrive as it was: push again")
    return f"{len(lacking)} files, {_megabytes(sent)} sent" if lacking else "nothing to copy"


def _receive(remote: Remote, do: str, cargo: Cargo) -> dict[str, Any]:
    order = {"do": do, "base": remote.host.directory, "roots": cargo.hashes}
    stdin = json.dumps(order).encode()
    command = [remote.host.python, "-c", RECEIVE]
    done = remote.run(command, stdin=stdin, timeout=CHECK_SECONDS)
    if done.rc != 0:
        probe(remote, remote.host.python)  # says so if it is not there, or too old
        raise HostError(f"{remote.host.python} there: {done.why}")
    answer: dict[str, Any] = json.loads(done.out)
    return answer


def _copy(remote: Remote, cargo: Cargo, lacking: list[str]) -> int:
    """One run of rsync, from a tree of links to the files; returns the bytes that it sent."""
    paths = cargo.paths()
    with tempfile.TemporaryDirectory(prefix="seedwire-push-") as folder:
        for path in lacking:
            link = Path(folder) / path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(paths[path].resolve())
        target = remote.path(remote.host.at(INCOMING))
        options = ["--recursive", "--copy-links", "--times", "--partial", "--ignore-times"]
        arguments = [*options, "--stats", f"{folder}/", f"{target}/"]
        done = remote.rsync(arguments, timeout=COPY_SECONDS)
    found = re.search(r"^Total bytes sent: ([\d,.]+)$", done.text, re.MULTILINE)
    return int(re.sub(r"\D", "", found[1])) if found else 0


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"
