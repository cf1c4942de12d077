"""Hosts of a network that is ours alone: network namespaces, a switch, one cable each.

The switch is a bridge in a namespace too, so this machine sees one end of a cable, if anything.
Everything has the network's name in its own, so that it is found and removed by that alone, whoever
made it and however that ended.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.errors import LabError

NAMESPACES = Path("/run/netns")
SWITCH = "switch"
BURST_SECONDS = 0.004  # of a full rate; less, and a fast link is slower than its cap
NETEM_PACKETS = 10_000  # that may be under way, e.g. 1 Gbit/s for 100 ms


@dataclass(frozen=True)
class Link:
    """What a host's cable carries; 0 is no cap.

    Attributes:
        down: bits a second towards the host.
        up: bits a second from it.
        rtt_ms: added to a round trip, half on each way.
        loss_percent: packets lost on each way.
    """

    down: int = 0
    up: int = 0
    rtt_ms: float = 0.0
    loss_percent: float = 0.0

    @property
    def needs_netem(self) -> bool:
        """Whether it is more than a rate."""
        return bool(self.rtt_ms or self.loss_percent)


class Network:
    """A switch, hosts, and a cable from it to this machine if that has an address.

    Args:
        name: no other network's on this machine, and no beginning of one.
        addresses: of the hosts, in one subnet.
        bits: of the subnet's prefix.
        here: this machine's address, or "" for none; then ``name`` has 15 letters at most.
    """

    def __init__(
        self, name: str, addresses: Mapping[str, str], bits: int = 24, here: str = ""
    ) -> None:
        self.addresses = dict(addresses)
        self._name, self._bits, self._here = name, bits, here

    def __enter__(self) -> Network:
        try:
            self.build()
        except BaseException:
            self.tear_down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.tear_down()

    def build(self) -> None:
        """Make it all.

        Raises:
            LabError: the kernel does not grant it; what was made so far is left.
        """
        self._make(SWITCH)
        self._in(SWITCH, "ip", "link", "add", "bridge", "type", "bridge")
        self._in(SWITCH, "ip", "link", "set", "bridge", "up")
        if self._here:
            self._connect_this_machine()
        for name, address in self.addresses.items():
            self._make(name)
            self._connect(name, address)

    def tear_down(self) -> None:
        """Remove what has the network's name, after those who are still in it."""
        if (Path("/sys/class/net") / self._name).exists():
            call("ip", "link", "delete", self._name)  # at once: with its namespace it takes a while
        for path in self._namespaces():
            while pids := call("ip", "netns", "pids", path.name).split():
                kill(int(pid) for pid in pids)
            call("ip", "netns", "delete", path.name)  # links and qdiscs go with it

    def is_there(self) -> bool:
        """Whether any of it is."""
        return bool(self._namespaces())

    def path(self, name: str) -> Path:
        """What a process opens to be on a host."""
        return NAMESPACES / self._namespace(name)

    def unplug(self, name: str) -> None:
        """Pull the host's cable: nothing gets through, and nobody is told."""
        self._in(SWITCH, "ip", "link", "set", self._port(name), "nomaster")

    def plug(self, name: str) -> None:
        """Let everything through again."""
        self._in(SWITCH, "ip", "link", "set", self._port(name), "master", "bridge")

    def is_plugged(self, name: str) -> bool:
        said = call("ip", "-n", self._namespace(SWITCH), "link", "show", self._port(name))
        return " master bridge " in said

    def shape(self, name: str, link: Link, has_netem: bool = True) -> None:
        """Let a host's cable carry so much and no more, so late."""
        for where, device, rate in (
            (name, "eth0", link.up),
            (SWITCH, self._port(name), link.down),
        ):
            for discipline in disciplines(link, rate, has_netem):
                self._in(where, "tc", "qdisc", "add", "dev", device, *discipline)

    def has_netem(self) -> bool:
        """Whether the kernel can delay and lose packets."""
        try:
            self._in(SWITCH, "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
        except LabError:
            return False
        self._in(SWITCH, "tc", "qdisc", "delete", "dev", "lo", "root")
        return True

    def _connect(self, name: str, address: str) -> None:
        port, far = self._port(name), self._namespace(SWITCH)
        cable = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", port]
        self._in(name, *cable, "netns", far)
        self._in(name, "ip", "address", "add", f"{address}/{self._bits}", "dev", "eth0")
        self._in(name, "ip", "link", "set", "eth0", "up")
        self._in(SWITCH, "ip", "link", "set", port, "up", "master", "bridge")

    def _connect_this_machine(self) -> None:
        peer = ["peer", "name", "uplink", "netns", self._namespace(SWITCH)]
        call("ip", "link", "add", self._name, "type", "veth", *peer)
        call("ip", "address", "add", f"{self._here}/{self._bits}", "dev", self._name)
        call("ip", "link", "set", self._name, "up")
        self._in(SWITCH, "ip", "link", "set", "uplink", "up", "master", "bridge")

    def _make(self, name: str) -> None:
        call("ip", "netns", "add", self._namespace(name))
        self._in(name, "ip", "link", "set", "lo", "up")

    def _namespaces(self) -> list[Path]:
        return sorted(NAMESPACES.glob(f"{self._name}-*"))

    def _in(self, name: str, tool: str, *arguments: str) -> None:
        call(tool, "-n", self._namespace(name), *arguments)

    def _namespace(self, name: str) -> str:
        return f"{self._name}-{name}"

    def _port(self, name: str) -> str:
        return f"port{list(self.addresses).index(name)}"  # names of links are short


def disciplines(link: Link, rate: int, has_netem: bool = True) -> list[list[str]]:
    """What ``tc qdisc add`` is told for one way of a cable, in order.

    Args:
        link: whose delay and loss.
        rate: bits a second on this way; 0 is no cap.
        has_netem: else there is no delay and no loss.
    """
    place, found = ["root"], []
    if has_netem and link.needs_netem:
        delay, loss = f"{link.rtt_ms / 2:g}ms", f"{link.loss_percent:g}%"
        limit = ["limit", str(NETEM_PACKETS)]
        found.append([*place, "handle", "1:", "netem", *limit, "delay", delay, "loss", loss])
        place = ["parent", "1:1"]
    if rate:
        burst = max(16_384, round(rate / 8 * BURST_SECONDS))
        shape = ["tbf", "rate", f"{rate}bit", "burst", f"{burst}b", "latency", "400ms"]
        found.append([*place, *shape])
    return found


def impossible() -> str | None:
    """Why there can be no such network here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not all(map(shutil.which, ("ip", "tc", "unshare"))):
        return "no ip and tc (iproute2), or no unshare (util-linux)"
    command = ["unshare", "--net", "--mount", "true"]
    if subprocess.run(command, capture_output=True, check=False).returncode:  # noqa: S603
        return "the kernel grants no network namespace"
    return None


def call(*command: str) -> str:
    """Run a command and return what it prints.

    Raises:
        LabError: it has failed, with its last line.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        raise LabError(f"{' '.join(command)}: {said[-1]}")
    return done.stdout


def kill(pids: Iterable[int]) -> None:
    """End processes at once; those that are gone already are no matter."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
