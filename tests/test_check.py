"""What is found wrong with a host, and what is said to do about it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deploy import listener, probe
from deploy.findings import Facts, Software, findings
from deploy.inventory import Inventory, parse

FIT = Facts(
    system=Software("3.11.2", None, None, None, True),
    venv=Software("3.11.2", "2.5.0", None, "0.1.0", True),
    machine="aarch64",
    memory=4_000_000_000,
    available=3_000_000_000,
    cores=4,
    disk=10_000_000_000,
    writable=True,
    throttled="",
    rsync=True,
    gpu=False,
    port="",
)


def inventory(bind: str = "tcp://0.0.0.0:5555", **host: Any) -> Inventory:
    centre = {"address": "tcp://192.0.2.1:5555", "bind": bind}
    table = {"coordinator": centre, "hosts": {"a": {"address": "a"} | host}}
    return parse(table, Path("cluster.toml"))


def found(facts: Facts, inventory: Inventory) -> list[tuple[str, str, str]]:
    made = findings(inventory.hosts[0], inventory, facts, "0.1.0")
    return [(f.level, f.what, f.mend) for f in made]


def test_a_host_that_is_fit_has_no_findings() -> None:
    assert found(FIT, inventory()) == []


@pytest.mark.parametrize(
    ("change", "host", "level", "what", "mend"),
    [
        ({"system": None, "venv": None}, {}, "fail", "python3 does not start", "`python`"),
        ({"venv": Software("3.8.10", "2", None, "0.1.0", True)}, {}, "fail", "3.8.10", "newer"),
        ({"venv": None}, {}, "warn", "no Seedwire yet", "cluster push"),
        ({"venv": None}, {"venv": "/v"}, "fail", "no Python in /v", "`venv`"),
        (
            {"venv": None, "system": Software("3.11.2", None, None, None, False)},
            {},
            "fail",
            "makes no venv",
            "apt install python3.11-venv",
        ),
        ({"venv": Software("3.11.2", "2", None, "0.0.9", True)}, {}, "fail", "0.0.9", "push"),
        ({"venv": Software("3.11.2", None, None, "0.1.0", True)}, {}, "fail", "no torch", "push"),
        ({"gpu": True}, {"device": "cuda"}, "fail", "without CUDA", "vendor"),
        ({}, {"device": "cuda"}, "fail", "no NVIDIA device", "driver"),
        ({"rsync": False}, {}, "fail", "no rsync", "apt install rsync"),
        ({"machine": "armv7l"}, {}, "fail", "armv7l", "64-bit"),
        ({"writable": False}, {}, "fail", "cannot be written", "chown"),
        ({"disk": 10**9, "venv": None}, {}, "fail", "1.0 GB of disk", "make room"),
        ({"available": 10**8}, {}, "warn", "100 MB of memory", "seedwire memory"),
        ({}, {"limits": {"memory": "9GB"}}, "warn", "limits.memory is 9GB", "`limits`"),
        ({"throttled": "under-voltage"}, {}, "warn", "under-voltage", "power supply"),
        ({"port": "refused"}, {}, "fail", "(refused)", "coordinator.address"),
        ({"port": "silent"}, {}, "fail", "(silent)", "ufw allow 5555/tcp"),
        ({"port": "unknown"}, {}, "fail", "(unknown)", "does not know this name"),
        ({"port": "stranger"}, {}, "fail", "(stranger)", "another service"),
        ({"port": "No route to host"}, {}, "fail", "(No route to host)", "network"),
    ],
)
def test_each_fault_is_found_with_what_to_do(
    change: dict[str, Any], host: dict[str, Any], level: str, what: str, mend: str
) -> None:
    said = found(msgspec.structs.replace(FIT, **change), inventory(**host))
    assert [f for f in said if f[0] == level and what in f[1] and mend in f[2]], said


def test_a_coordinator_bound_to_its_own_machine_is_told_apart() -> None:
    said = found(msgspec.structs.replace(FIT, port="refused"), inventory("tcp://127.0.0.1:5555"))
    assert 'bind = "tcp://0.0.0.0:5555"' in said[0][2]


# --- the port, for real ----------------------------------------------------------


def stand_in(port: int) -> subprocess.Popen[bytes]:
    words = [sys.executable, listener.__file__, "127.0.0.1", str(port)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.mark.net
def test_ports_are_told_apart() -> None:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
        with stand_in(port) as second:
            assert second.stdout is not None
            assert second.stdout.readline() == b"taken\n"
    assert probe.reach("127.0.0.1", port) == "refused"
    assert probe.reach("no-such-host.invalid", port) == "unknown"
    with stand_in(port) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        assert probe.reach("127.0.0.1", port) == ""
        process.stdin.close()
        assert process.wait(30.0) == 0


def test_the_probe_says_what_this_machine_has_without_importing_torch() -> None:
    wanted = {"interpreter": sys.executable, "directory": "~/no/such", "reach": None}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", probe.__file__, json.dumps(wanted)],
        capture_output=True,
        check=True,
    )
    facts = msgspec.json.decode(done.stdout, type=Facts)
    assert facts.venv is not None
    assert facts.venv.python.startswith("3.")
    assert facts.venv.torch is not None
    assert facts.disk > 0
    assert b"torch" not in done.stderr
