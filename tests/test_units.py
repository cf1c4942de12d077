"""systemd's units: what systemd itself says of them, and what is made for one host."""

from __future__ import annotations

import configparser
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from deploy import units
from deploy.units import COORDINATOR, NODE, Place
from protocol import keys
from protocol.errors import KeyStoreError

MOST_EXPOSURE = 2.0  # of 10, as systemd-analyze counts
BOARD = Place(
    program="/home/pi/.seedwire/venv/bin/seedwire",
    configuration="/home/pi/.seedwire/run",
    keys="/home/pi/.seedwire/keys",
    cache="/home/pi/.seedwire/cache",
    user="pi",
)
PLACES = {"system": Place(), "board": BOARD, "user": Place.of_user()}
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine"
)


def settings(text: str) -> dict[str, str]:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(text)
    return dict(parser["Service"])


def analyze(*arguments: str, runtime: Path) -> subprocess.CompletedProcess[str]:
    """``runtime`` is a directory that a user's manager would have."""
    env = os.environ | {"XDG_RUNTIME_DIR": str(runtime)}
    command = ["systemd-analyze", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)


@needs_systemd
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [COORDINATOR, NODE])
def test_systemd_finds_nothing_wrong_with_a_unit(name: str, place: str, tmp_path: Path) -> None:
    program = tmp_path / "seedwire"
    program.symlink_to("/bin/true")  # it has to be there, which is all that is checked of it
    text = units.unit(name, PLACES[place])
    path = tmp_path / name
    path.write_text(text.replace(settings(text)["ExecStart"].split()[0], str(program)))
    scope = ["--user"] if place == "user" else []
    done = analyze(*scope, "verify", "--man=no", str(path), runtime=tmp_path)
    said = [line for line in done.stderr.splitlines() if "seedwire" in line]
    assert (done.returncode, said) == (0, []), done.stderr


@needs_systemd
@pytest.mark.parametrize("name", [COORDINATOR, NODE])
def test_the_units_of_the_system_expose_little(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(units.unit(name))
    most = f"--threshold={MOST_EXPOSURE * 10:.0f}"
    done = analyze("security", "--offline=true", "--no-pager", most, str(path), runtime=tmp_path)
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze does not look at files: systemd 250 does")
    assert done.returncode == 0, done.stdout


@needs_systemd
def test_a_unit_that_is_wrong_is_found(tmp_path: Path) -> None:
    path = tmp_path / NODE
    path.write_text(units.unit(NODE).replace("Restart=on-failure", "Restart=sometimes"))
    assert "sometimes" in analyze("verify", "--man=no", str(path), runtime=tmp_path).stderr


def test_the_template_is_the_unit_of_the_default_place() -> None:
    for name in (COORDINATOR, NODE):
        assert units.unit(name) == (units.TEMPLATES / name).read_text()


def test_a_users_unit_asks_for_nothing_that_needs_root() -> None:
    rootless = settings(units.unit(NODE, Place.of_user()))
    assert not [key for key in rootless if key.startswith(("Protect", "Private", "LoadCred"))]
    assert rootless.keys().isdisjoint({"User", "CacheDirectory", "DevicePolicy"})
    assert rootless["NoNewPrivileges"] == "yes"
    assert rootless["WatchdogSec"] == "60"
    assert rootless["EnvironmentFile"] == "%h/.seedwire/run/%i.env"
    assert rootless["ExecStart"].startswith("%h/.seedwire/venv/bin/seedwire node ")
    text = units.unit(NODE, Place.of_user())
    assert "SEEDWIRE_KEYS=%h/.seedwire/keys" in text
    assert "WantedBy=default.target" in text
    assert "network-online" not in text


def test_a_persons_system_unit_runs_as_them_and_writes_in_no_other_part_of_their_home() -> None:
    text = units.unit(NODE, BOARD)
    service = settings(text)
    assert service["User"] == "pi"
    assert service["ProtectHome"] == "read-only"
    assert service["ReadWritePaths"] == "-/home/pi/.seedwire/cache"
    assert "LoadCredential=%i.key:/home/pi/.seedwire/keys/%i.key\n" in text


def test_the_limit_of_memory_is_the_kernels_and_cuda_alone_gets_devices() -> None:
    assert units.drop_in() == ""
    lines = units.drop_in(1_500_000_000).splitlines()
    assert lines == [
        "[Service]",
        "MemoryHigh=1425000000",
        "MemoryMax=1500000000",
        "MemorySwapMax=0",
    ]
    assert "DeviceAllow=char-nvidia* rw" in units.drop_in(device="cuda:1")
    assert units.drop_in(device="cuda", scope="user") == ""


def test_a_nodes_files_and_commands() -> None:
    variables = {"COORDINATOR": "tcp://192.0.2.1:5555", "OPTIONS": '--energy "a b"'}
    files = units.node_files(Place.of_user(), "pi-1", variables, units.drop_in(10**9))
    base = "~/.config/systemd/user/seedwire-node@"
    assert set(files) == {
        f"{base}.service",
        f"{base}pi-1.service.d/host.conf",
        "~/.seedwire/run/pi-1.env",
    }
    said = files["~/.seedwire/run/pi-1.env"]
    assert shlex.split(said) == [f"{name}={value}" for name, value in variables.items()]
    assert units.systemctl("system", "stop") == ["sudo", "-n", "systemctl", "stop"]
    assert units.start("user", "pi-1")[0] == ["loginctl", "enable-linger"]
    assert "--no-block seedwire-node@pi-1.service" in units.start("user", "pi-1")[-1][-1]
    with pytest.raises(ValueError, match="one line"):
        units.environment({"OPTIONS": "a\nExecStart=b"})


def test_what_the_manager_shows_is_read_and_what_it_does_not_know_left_out() -> None:
    said = "ActiveState=active\nStatusText=run a/1: waiting\nMemoryPeak=[not set]\nResult="
    assert units.shown(said) == {"ActiveState": "active", "StatusText": "run a/1: waiting"}


# --- keys that systemd hands over -------------------------------------------------


@pytest.mark.parametrize("mode", [0o400, 0o440, 0o600])
def test_keys_are_taken_as_systemd_hands_them_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    """Mode 440 is what a list that lets one user read looks like."""
    made = keys.make(tmp_path / "made", "pi-1")
    handed = tmp_path / "credentials"
    shutil.copytree(tmp_path / "made", handed)
    (handed / "pi-1.key").chmod(mode)
    handed.chmod(0o550)
    monkeypatch.delenv("SEEDWIRE_KEYS", raising=False)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(handed))
    assert keys.default_directory() == handed
    assert keys.load(handed, "pi-1") == made
    monkeypatch.setenv("SEEDWIRE_KEYS", "elsewhere")
    assert keys.default_directory() == Path("elsewhere")
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    with pytest.raises(KeyStoreError, match="is open to other users"):
        keys.load(handed, "pi-1")  # the directory is, and nobody says why


@pytest.mark.parametrize("mode", [0o404, 0o460, 0o620])
def test_a_credential_that_others_could_read_or_change_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    keys.make(tmp_path, "pi-1")
    os.chmod(tmp_path / "pi-1.key", mode)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    with pytest.raises(KeyStoreError, match="is open to other users"):
        keys.load(tmp_path, "pi-1")
