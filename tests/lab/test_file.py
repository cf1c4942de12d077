"""``lab.toml``: profiles combined, hosts counted out, and one line for each fault."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from deploy.errors import LabError
from deploy.lab import lab
from deploy.lab.file import PROFILES, File, Host, HostTable, LabTable, load, resolve
from deploy.lab.network import Link, disciplines


def hosts(text: str) -> dict[str, Host]:
    return {h.name: h for h in resolve(msgspec.toml.decode(text, type=File)).hosts}


def test_a_later_profile_goes_over_an_earlier_one_and_the_hosts_own_keys_over_both() -> None:
    found = hosts("[hosts.a]\nprofiles = ['pi4', 'wifi']\nmemory = '300MB'\nup = ''")["a"]
    assert found.memory == 300_000_000
    assert found.cpus == 4
    assert found.link == Link(down=30_000_000, up=0, rtt_ms=2)


def test_the_page_has_every_key_and_the_profiles_numbers() -> None:
    page = (Path(__file__).parents[2] / "docs/lab.md").read_text()
    keys = {*LabTable.__struct_fields__, *HostTable.__struct_fields__}
    assert not [key for key in keys if f"`{key}`" not in page and f".{key}`" not in page]
    for name, profile in PROFILES.items():
        cells = re.search(rf"^\| `{name}` \|(.*)\|$", page, re.MULTILINE)
        assert cells is not None
        written = [cell.strip().replace(" ", "") for cell in cells[1].split("|")[:5]]
        rates = [
            str(r).replace("gbit", "Gbit/s").replace("mbit", "Mbit/s")
            for r in (profile.down, profile.up)
        ]
        rtt = f"{profile.rtt_ms}ms" if profile.rtt_ms else ""
        assert written == [profile.memory or "", str(profile.cpus or ""), *rates, rtt]


def test_a_host_without_profile_has_no_limits() -> None:
    found = hosts("[hosts.a]")["a"]
    assert (found.memory, found.cpus, found.link) == (0, 0.0, Link())


def test_hosts_of_a_count_are_numbered_and_get_addresses_in_order_after_ours() -> None:
    text = "[lab]\nnetwork = '10.1.2.0/24'\n[hosts.pi]\ncount = 2\n[hosts.jet]"
    lab = resolve(msgspec.toml.decode(text, type=File))
    assert lab.here == "10.1.2.1"
    assert [(h.name, h.address) for h in lab.hosts] == [
        ("pi-1", "10.1.2.2"),
        ("pi-2", "10.1.2.3"),
        ("jet", "10.1.2.4"),
    ]


def test_a_hosts_inventory_goes_over_the_labs() -> None:
    text = "[lab.inventory]\nvenv = '/v'\nthreads = 1\n[hosts.a.inventory]\nthreads = 2\n[hosts.b]"
    found = hosts(text)
    assert found["a"].inventory == {"venv": "/v", "threads": 2}
    assert found["b"].inventory == {"venv": "/v", "threads": 1}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "Object missing required field `hosts`"),
        ("hosts = {a = 1}", "hosts.a: Expected `object`"),
        ("[lab]\nport = 0\n[hosts.a]", "lab.port: "),
        ("hosts = {}", "hosts: want 1 to 250, not 0"),
        ("[hosts.a]\nmemroy = '1GB'", "hosts.a: Object contains unknown field `memroy`"),
        ("[hosts.a]\nmemory = '1 quart'", "hosts.a.memory: "),
        ("[hosts.a]\ndown = '5'", "hosts.a.down: "),
        ("[hosts.a]\ncpus = -1", "hosts.a.cpus: "),
        ("[hosts.a]\nloss_percent = nan", "hosts.a.loss_percent: "),
        ("[hosts.a]\nprofiles = ['pi3']", "hosts.a.profiles: no profile pi3: there are pi4, pi5"),
        ("[hosts.A_B]", "hosts.A_B: want"),
        ("[hosts.switch]", "the name switch is taken"),
        ("[hosts.a-1]\n[hosts.a]\ncount = 1", "the name a-1 is taken"),
        ("[lab]\ncoordinator = 'b'\n[hosts.a]", "lab.coordinator: no host b"),
        ("[lab]\nnetwork = '10.0.0.1/24'\n[hosts.a]", "lab.network: "),
        ("[lab]\nnetwork = '10.0.0.0/29'\n[hosts.a]\ncount = 6", "no room for 6 hosts"),
        ("[hosts.a]\ncount = 250\n[hosts.b]", "hosts: want 1 to 250, not 251"),
        ("[hosts", "not TOML: "),
    ],
)
def test_a_fault_is_one_line_that_names_file_and_key(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "lab.toml"
    path.write_text(text)
    with pytest.raises(LabError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


def test_delay_and_loss_come_first_and_the_rate_inside_of_them() -> None:
    link = Link(down=8_000_000, rtt_ms=70, loss_percent=0.5)
    tbf = ["tbf", "rate", "8000000bit", "burst", "16384b", "latency", "400ms"]
    netem = ["netem", "limit", "10000", "delay", "35ms", "loss", "0.5%"]
    assert disciplines(link, link.down) == [
        ["root", "handle", "1:", *netem],
        ["parent", "1:1", *tbf],
    ]
    assert disciplines(link, link.down, has_netem=False) == [["root", *tbf]]
    assert disciplines(link, link.up) == [["root", "handle", "1:", *netem]]
    assert disciplines(Link(), 0) == []


def test_who_is_not_root_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("deploy.lab.host.tool", lambda name: f"/usr/bin/{name}")
    with pytest.raises(LabError, match="no lab here: network namespaces need root"):
        lab.down(tmp_path)


def test_who_lacks_a_tool_is_told_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("deploy.lab.host.tool", lambda name: None if name == "sshd" else name)
    with pytest.raises(LabError, match=r"no lab here: install sshd \(openssh-server\)"):
        lab.down(tmp_path)
