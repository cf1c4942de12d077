"""Runs on a host, by its own Python: starts, watches and ends what outlives the login.

``deploy.nodes`` sends this text, for Python 3.8 and its library.  A process is ours if its
id, its start time and the boot are those that ``run/NAME.json`` has, so an id that was used
again is never ended.  A shell stays with each, to write its exit code to ``run/NAME.code``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict

POLL_SECONDS = 0.1
STOP_SECONDS = 15.0
CODE_SECONDS = 3.0  # a busy machine's shell comes that much later
TAIL_BYTES = 4096
CHUNK_BYTES = 1 << 16
SHELL = """code=$1 pid=$2; shift 2; "$@" & echo $! > "$pid"; wait $!; echo $? > "$code" """

Table = Dict[str, Any]


class Place:
    """Where the files of one process are."""

    def __init__(self, directory: str, name: str) -> None:
        self.directory = Path(directory).expanduser()
        self.facts = self.directory / "run" / (name + ".json")
        self.code = self.facts.with_suffix(".code")
        self.pid = self.facts.with_suffix(".pid")
        self.unit = self.facts.with_suffix(".systemd")  # whose systemd has it, if one has
        self.log = self.directory / "logs" / (name + ".log")

    def known(self) -> Table:
        """What was started last, or {}."""
        try:
            known: Table = json.loads(self.facts.read_text())
            return known
        except (OSError, ValueError):
            return {}

    def status(self, after: int | None = None) -> Table:
        """How it is: ``state`` is "running", "ended", "gone" (no exit code), or "absent".

        With ``after``, also what its log has from there on; below 0 that counts from the end.
        """
        known = self.known()
        mark = known.get("identity")  # None if it had ended before it was looked at
        is_alive = mark is not None and identity(known["pid"]) == mark
        if known and not is_alive:
            wait_for_code(self)
        code = None if is_alive else number(self.code)
        ended = "gone" if code is None else "ended"
        state = "running" if is_alive else ended if known else "absent"
        said: Table = {"state": state, "code": code, "systemd": read_from(self.unit, 0)[0]}
        said["line"] = last_line(self.log)
        if is_alive:
            memory = resident_bytes(known["pid"])
            age = time.time() - known["since"]
            said.update({"pid": known["pid"], "seconds": age, "memory": memory})
        if after is not None:
            if after < 0:
                after = max(0, size_of(self.log) + after)
            said["text"], said["size"] = read_from(self.log, after)
        return said


def start(
    place: Place, command: list[str], env: dict[str, str], until: str, within: float
) -> Table:
    """Start a command unless it runs; wait for a line of its log.

    Args:
        place: of its files.
        command: words; ``~/`` at the beginning of one is the home.
        env: added to the environment.
        until: text that its log has when all is well; "" waits for nothing.
        within: seconds to wait at the most.
    """
    if place.status()["state"] == "running":
        return dict(place.status(), seen=until in logged(place))
    for path in (place.facts, place.log):
        path.parent.mkdir(parents=True, exist_ok=True)
    for path in (place.facts, place.code, place.pid, place.unit):
        if path.exists():
            path.unlink()
    offset = size_of(place.log)
    words = [os.path.expanduser(word) for word in command]
    env = {key: os.path.expanduser(value) for key, value in env.items()}
    with open(str(place.log), "ab") as log:
        subprocess.Popen(
            ["sh", "-c", SHELL, "sh", str(place.code), str(place.pid), *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=str(place.directory),
            env=dict(os.environ, **env),
            start_new_session=True,
        )
    while (pid := number(place.pid)) is None:
        time.sleep(POLL_SECONDS)
    facts = {"pid": pid, "identity": identity(pid), "since": time.time(), "offset": offset}
    part = place.facts.with_suffix(".part")
    part.write_text(json.dumps(facts))
    part.replace(place.facts)
    place.pid.unlink()
    deadline = time.monotonic() + within
    while until not in logged(place) and place.status()["state"] == "running":
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    return dict(place.status(), seen=until in logged(place), offset=offset)


def stop(place: Place, within: float = STOP_SECONDS) -> Table:
    """End it: asked first, after ``within`` seconds by force; nothing if it does not run."""
    known, was = place.known(), place.status()["state"]
    group = group_of(known["pid"]) if was == "running" else None  # its own: its children's, too
    for number_, seconds in ((signal.SIGTERM, within), (signal.SIGKILL, STOP_SECONDS)):
        deadline = time.monotonic() + seconds
        if place.status()["state"] == "running":
            send(os.kill, known["pid"], number_)
        while place.status()["state"] == "running" and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    if group is not None:
        send(os.killpg, group, signal.SIGKILL)
    said = dict(place.status(), was=was)
    if said["state"] != "running":
        for path in (place.facts, place.code, place.unit):
            if path.exists():
                path.unlink()
    return said


def send(how: Any, target: int, what: int) -> None:
    """Send a signal, unless nobody is left to get it."""
    with contextlib.suppress(ProcessLookupError):
        how(target, what)


def group_of(pid: int) -> int | None:
    """The process group, or None if it has just ended."""
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(pid)
    return None


def wait_for_code(place: Place) -> None:
    """Give its shell a moment to write the exit code."""
    deadline = time.monotonic() + CODE_SECONDS
    while number(place.code) is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS / 10)


def logged(place: Place) -> str:
    """What it has said since it was started."""
    return read_from(place.log, place.known().get("offset", 0), 1 << 24)[0]


def identity(pid: int) -> str | None:
    """What no other process has, ever: the boot and the start time; None if it is not there."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return None if fields[0] in "ZX" else boot + " " + fields[19]
    except OSError:
        if os.path.exists("/proc/self/stat"):
            return None
    done = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)], stdout=subprocess.PIPE, check=False
    )
    return done.stdout.decode().strip() or None


def resident_bytes(pid: int) -> int | None:
    """Resident memory, or None where the system does not say."""
    try:
        with open(f"/proc/{pid}/status") as file:
            lines = dict(line.partition(":")[::2] for line in file)
        return int(lines["VmRSS"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def number(path: Path) -> int | None:
    """The number in a file; None if there is none, or not yet all of it."""
    try:
        text = path.read_text()
    except OSError:
        return None
    return int(text) if text.endswith("\n") else None


def read_from(path: Path, offset: int, limit: int = CHUNK_BYTES) -> tuple[str, int]:
    """Text of a file from an offset on, at most so much, and the offset behind it."""
    try:
        with open(str(path), "rb") as file:
            file.seek(offset)
            data = file.read(limit)
    except OSError:
        return "", offset
    return data.decode(errors="replace"), offset + len(data)


def size_of(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def last_line(path: Path) -> str:
    """The last line of a log, or ""."""
    lines = read_from(path, max(0, size_of(path) - TAIL_BYTES))[0].strip().splitlines()
    return lines[-1].strip() if lines else ""


def main() -> None:
    """Do what the JSON in the first argument says; print what came of it as JSON."""
    wanted = json.loads(sys.argv[1])
    place = Place(wanted.pop("directory"), wanted.pop("name"))
    do = wanted.pop("do")
    verbs: dict[str, Any] = {"start": start, "stop": stop, "status": Place.status}
    print(json.dumps(verbs[do](place, **wanted)))


if __name__ == "__main__":
    main()
