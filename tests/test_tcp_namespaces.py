"""Our TCP bytes against a count of others: the interfaces of network namespaces, less headers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.net, pytest.mark.slow]

ROUNDS = 100
# IPv4 and TCP with time stamps; a cable counts Ethernet's as well, loopback takes it off first
HEADERS = {"lo": 20 + 32, "cable": 14 + 20 + 32}
IP = shutil.which("ip") or ""
# First segments have longer headers than those that are taken off, resets have shorter ones: some
# 50 bytes of a run, whose updates of four scalars are 100 messages of some 100 bytes.
LEAST = {"scalar": 16, "sparse": 4 * 4_688, "dense": 4 * 75_000}  # bytes of a payload's values


def ip(*arguments: str) -> None:
    subprocess.run([IP, *arguments], check=True, capture_output=True)


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two, with a cable between them: 10.9.0.1 is at the first, 10.9.0.2 at the second."""
    if os.geteuid() or not IP:
        pytest.skip("network namespaces need root and iproute2")
    names = f"sw-a-{os.getpid()}", f"sw-b-{os.getpid()}"
    try:
        for name in names:
            ip("netns", "add", name)
            # neighbours found by IPv6 are no bytes of ours
            quiet = "/proc/sys/net/ipv6/conf/default/disable_ipv6"
            ip("netns", "exec", name, "sh", "-c", f"echo 1 > {quiet}")
        ip(
            "-n",
            names[0],
            "link",
            "add",
            "cable",
            "type",
            "veth",
            "peer",
            "cable",
            "netns",
            names[1],
        )
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.9.0.{i + 1}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run([IP, "netns", "del", name], check=False, capture_output=True)


def talk(namespace: str, *arguments: str) -> subprocess.Popen[str]:
    line = [IP, "netns", "exec", namespace, sys.executable, "-m", "tests.talk", *arguments]
    root = Path(__file__).parents[1]
    return subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=root)


def counted(namespace: str, device: str) -> tuple[int, int]:
    """Bytes received and sent by an interface, less the headers of as many packets."""
    line = [IP, "netns", "exec", namespace, "cat", "/proc/net/dev"]
    table = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    row = next(r for r in table.splitlines() if r.strip().startswith(f"{device}:"))
    numbers = [int(n) for n in row.split(":")[1].split()]
    headers = HEADERS[device]
    return numbers[0] - headers * numbers[1], numbers[8] - headers * numbers[9]


@pytest.mark.parametrize("payload", LEAST)
@pytest.mark.parametrize("way", ["loopback", "cable"])
@pytest.mark.parametrize("mechanism", ["null", "curve"])
def test_our_bytes_are_the_interfaces_over_100_rounds_and_a_reconnect(
    namespaces: tuple[str, str], mechanism: str, way: str, payload: str
) -> None:
    near, far = namespaces if way == "cable" else (namespaces[0], namespaces[0])
    device, address = ("cable", "10.9.0.1") if way == "cable" else ("lo", "127.0.0.1")
    how = str(ROUNDS), payload, mechanism
    coordinator = talk(near, "coordinator", *how, f"tcp://{address}:*")
    assert coordinator.stdout is not None
    node = talk(far, "node", *how, coordinator.stdout.readline().strip())
    try:
        up, down, connections = map(int, coordinator.stdout.readline().split())
        assert node.wait(60) == coordinator.wait(60) == 0
    finally:
        for process in (node, coordinator):
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
    assert connections == 2
    received, sent = counted(near, device)
    if way == "loopback":  # what one end sends the other receives, on the same interface
        assert received == sent
        assert up + down == pytest.approx(received, rel=0.01)
    else:
        assert up == pytest.approx(received, rel=0.01)
        assert down == pytest.approx(sent, rel=0.01)
    assert up > ROUNDS * LEAST[payload]
