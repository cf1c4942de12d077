"""The inventory: what a file means, and what is wrong with it in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.clients import numbers, spans
from deploy.errors import InventoryError
from deploy.hosts import Limits
from deploy.inventory import Inventory, load, parse

COORDINATOR = {"address": "tcp://192.0.2.1:5555"}
FULL = """
[cluster]
ssh_config = "ssh_config"
python = "python3.11"
[coordinator]
host = "orin"
address = "tcp://192.0.2.7:5555"
[groups.pi4]
count = 2
address = "pi4-{i}.local"
user = "pi"
limits = { memory = "1500MB" }
[hosts.orin]
address = "192.0.2.7"
port = 2222
python = "/usr/bin/python3.10"
directory = "/srv/seedwire"
device = "cuda"
clients = "0-3"
systemd = "user"
labels = { board = "jetson-orin-nano" }
"""


def inventory(**hosts: dict[str, Any]) -> Inventory:
    tables = {name.replace("_", "-"): {"address": name} | table for name, table in hosts.items()}
    return parse({"coordinator": COORDINATOR, "hosts": tables}, Path("cluster.toml"))


def test_a_file_gives_hosts_with_nothing_left_to_be_filled_in(tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").write_text(FULL)
    (tmp_path / "ssh_config").write_text("")
    found = load(tmp_path / "cluster.toml")
    assert [host.name for host in found.hosts] == ["pi4-1", "pi4-2", "orin"]
    first, _, orin = found.hosts
    assert (first.address, first.user, first.port) == ("pi4-1.local", "pi", 0)
    assert (first.python, first.device, first.systemd) == ("python3.11", "cpu", "")
    assert first.limits.memory == "1500MB"
    assert first.at("logs", "a.log") == "~/.seedwire/logs/a.log"
    assert first.interpreter == "~/.seedwire/venv/bin/python"
    assert first.ssh_config == tmp_path / "ssh_config"
    assert (orin.python, orin.port, orin.at("run")) == (
        "/usr/bin/python3.10",
        2222,
        "/srv/seedwire/run",
    )
    assert orin.labels == {"board": "jetson-orin-nano"}
    assert found.coordinator.host == "orin"
    assert found.host("orin") is orin


def test_a_venv_that_exists_is_used() -> None:
    assert inventory(a={"venv": "/opt/v/"}).hosts[0].interpreter == "/opt/v/bin/python"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"hots": {}}, "unknown section [hots]"),
        ({"coordinator": {}}, "coordinator: Object missing required field `address`"),
        ({"coordinator": {"address": "1.2.3.4"}}, "coordinator.address: Expected"),
        ({"coordinator": COORDINATOR | {"host": "c"}}, "coordinator.host: no host c"),
        ({"cluster": {"direktory": "/x"}}, "cluster: Object contains unknown field `direktory`"),
        ({"cluster": {"directory": "x"}}, "cluster.directory: Expected"),
        ({"cluster": {"ssh_config": "gone"}}, "cluster.ssh_config: gone is not there"),
        ({"hosts": {}}, "no hosts: want"),
        ({"hosts": []}, "hosts: want tables"),
        ({"hosts": {"a b": {"address": "a"}}}, "hosts.a b: want up to 63"),
        ({"hosts": {"evaluator": {"address": "a"}}}, "hosts.evaluator: the name"),
        ({"hosts": {"a": {}}}, "hosts.a: Object missing required field `address`"),
        ({"hosts": {"a": {"address": "-oProxyCommand=x"}}}, "hosts.a.address: Expected"),
        ({"hosts": {"a": {"address": "a b"}}}, "hosts.a.address: Expected"),
        ({"hosts": {"a": {"address": "a", "user": "-x"}}}, "hosts.a.user: Expected"),
        ({"hosts": {"a": {"address": "a", "port": 70000}}}, "hosts.a.port: Expected"),
        ({"hosts": {"a": {"address": "a", "clients": "x"}}}, "hosts.a.clients: Expected"),
        ({"hosts": {"a": {"address": "a", "clients": "3-1"}}}, "hosts.a.clients: 3-1 runs back"),
        ({"hosts": {"a": {"address": "a", "systemd": "yes"}}}, "hosts.a.systemd: Invalid enum"),
        (
            {"hosts": {"a": {"address": "a", "limits": {"memory": "lots"}}}},
            "hosts.a.limits.memory: Expected",
        ),
        (
            {"hosts": {"a": {"address": "a", "limits": {"memory": "0"}}}},
            "hosts.a.limits: memory 0: want 1 to 2^40 bytes",
        ),
        (
            {"groups": {"a": {"count": 1, "address": "a", "limits": {"memory": "0.4B"}}}},
            "groups.a.limits: memory 0.4B: want 1 to 2^40 bytes",
        ),
        (
            {"hosts": {"a": {"address": "a", "limits": {"bytes": "1100GB"}}}},
            "hosts.a.limits: bytes 1100GB: want 1 to 2^40 bytes",
        ),
        (
            {"hosts": {"a": {"address": "a", "limits": {"bytes": "9" * 400}}}},
            "hosts.a.limits.bytes: Expected",
        ),
        (
            {
                "hosts": {
                    "a": {"address": "a", "clients": "1-3"},
                    "b": {"address": "b", "clients": "3"},
                }
            },
            "hosts.b.clients: a has client 3 already",
        ),
        (
            {"hosts": {"a": {"address": "x"}, "b": {"address": "x"}}},
            "hosts.b: the same address and directory as a",
        ),
        ({"groups": {"g": {"count": 2, "address": "g"}}}, "groups.g.address: want {i}"),
        ({"groups": {"g": {"count": 0, "address": "g{i}"}}}, "groups.g.count: Expected"),
        (
            {"groups": {"g": {"count": 2, "address": "g{i}", "clients": "1"}}},
            "groups.g.clients: hosts cannot share clients",
        ),
        (
            {"groups": {"g": {"count": 1, "address": "g{i}"}}, "hosts": {"g-1": {"address": "h"}}},
            "hosts.g-1: there is one of this name already",
        ),
    ],
)
def test_what_is_wrong_is_one_line_that_names_file_and_key(
    change: dict[str, Any], line: str
) -> None:
    table = {"coordinator": COORDINATOR, "hosts": {"a": {"address": "a"}}} | change
    with pytest.raises(InventoryError) as caught:
        parse(table, Path("some/cluster.toml"))
    assert str(caught.value).startswith(f"some/cluster.toml: {line}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"[", b"\xff", b"a = [" * 2000])
def test_a_file_that_is_not_toml_or_not_there_is_said(text: bytes, tmp_path: Path) -> None:
    with pytest.raises(InventoryError, match=r"cluster\.toml: No such file"):
        load(tmp_path / "cluster.toml")
    (tmp_path / "cluster.toml").write_bytes(text)
    with pytest.raises(InventoryError, match=r"cluster\.toml: not TOML"):
        load(tmp_path / "cluster.toml")


def test_clients_that_nobody_claims_are_dealt_evenly_among_those_who_say_nothing() -> None:
    hosts = inventory(a={}, b={"clients": "1,3"}, c={"clients": "none"}, d={})
    assert hosts.deal(7) == {"a": "0,2", "b": "1,3", "d": "4-6"}


def test_a_host_that_gets_no_client_is_left_out() -> None:
    assert inventory(a={}, b={}, c={}).deal(2) == {"a": "0", "b": "1"}


def test_clients_that_there_are_not_or_that_nobody_takes_are_said() -> None:
    with pytest.raises(InventoryError, match=r"hosts\.a\.clients: the .* has clients 0 to 3"):
        inventory(a={"clients": "2-4"}).deal(4)
    with pytest.raises(InventoryError, match="no host takes clients 0,3"):
        inventory(a={"clients": "1-2"}, b={"clients": "none"}).deal(4)


def test_a_host_that_there_is_not_is_said() -> None:
    with pytest.raises(InventoryError, match="no host z: there are a"):
        inventory(a={}).host("z")


@given(st.integers(0, 60), st.lists(st.none() | st.integers(0, 59), min_size=1, max_size=6))
def test_every_client_is_dealt_once(count: int, claims: list[int | None]) -> None:
    wanted: set[int] = set()
    tables = {"last": {"address": "last", "clients": ""}}
    for i, claim in enumerate(claims):
        ok = claim is not None and claim < count and claim not in wanted
        wanted |= {claim} if claim is not None and ok else set()
        tables[f"h{i}"] = {"address": f"h{i}", "clients": str(claim) if ok else ""}
    dealt = parse({"coordinator": COORDINATOR, "hosts": tables}, Path("c")).deal(count)
    assert sorted(c for clients in dealt.values() for c in numbers(clients)) == list(range(count))
    free = [len(numbers(c)) for name, c in dealt.items() if tables[name]["clients"] == ""]
    assert not free or max(free) - min(free) <= 1


@given(st.sets(st.integers(0, 999)))
def test_clients_as_text_are_the_clients(clients: set[int]) -> None:
    assert numbers(spans(sorted(clients))) == sorted(clients)


def test_the_whole_inventory_is_frozen() -> None:
    with pytest.raises(AttributeError):
        inventory(a={}).hosts[0].user = "root"  # type: ignore[misc]
    assert msgspec.to_builtins(inventory(a={}).coordinator)["bind"] == "tcp://0.0.0.0:5555"


@pytest.mark.parametrize(
    ("text", "nbytes"), [("", None), ("1500MB", 1_500_000_000), ("2 kB", 2000), ("1.5G", 1.5e9)]
)
def test_sizes_are_powers_of_1000(text: str, nbytes: float | None) -> None:
    assert Limits(memory=text).memory_bytes == nbytes
