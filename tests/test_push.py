"""A push to a real host on loopback: sshd, rsync, a venv, pip without any index."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from email.parser import Parser
from pathlib import Path

import msgspec
import numpy as np
import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from deploy import cargo, inventory, push, wheel
from deploy.cargo import Cargo
from deploy.cluster_cli import cluster_app
from deploy.errors import HostError
from deploy.hosts import Host
from deploy.install import install, prepare
from deploy.ssh import Done, Remote, remotes
from tests import sshd

pytestmark = [pytest.mark.net, pytest.mark.slow, pytest.mark.timeout(900)]
BASE = f"{sys.base_prefix}/bin/python{sys.version_info[0]}.{sys.version_info[1]}"
SITE = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
HERE = Path(np.__file__).parent.parent  # where the packages are that run these tests
NUMPY = "__version__ = '{}'\ndef zeros(n):\n    return [0] * n\n"
OLD_TORCH = """
def from_numpy(array):
    import numpy
    if numpy.__version__ >= "2":
        raise RuntimeError("Numpy is not available")
"""
FAKES = {"torch": OLD_TORCH, "numpy": NUMPY.format("1.26")}
FAKES["transformers"] = "def is_torch_available():\n    return True\n"


def _say(text: str) -> None:
    del text


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """What the host's user has installed: the site of its Python, empty at first."""
    site = tmp_path / "user" / SITE
    site.mkdir(parents=True)
    return site


@pytest.fixture
def config(user: Path, tmp_path: Path) -> Iterator[Path]:
    env = {
        "PYTHONUSERBASE": str(tmp_path / "user"),
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": "/dev/null",
    }
    with sshd.sshd(tmp_path / "ssh", env) as path:
        yield path


@pytest.fixture
def host(config: Path, tmp_path: Path) -> Host:
    table = {
        "cluster": {"ssh_config": str(config), "directory": str(tmp_path / "host dir")},
        "coordinator": {"address": "tcp://127.0.0.1:5555"},
        "hosts": {"one": {"address": "board", "python": BASE}},
    }
    return inventory.parse(table, tmp_path / "cluster.toml").host("one")


@pytest.fixture
def remote(host: Host) -> Iterator[Remote]:
    with remotes([host]) as (made,):
        yield made


@pytest.fixture
def packages(user: Path) -> None:
    """The host has what these tests run with, a torch too, as a vendor would have put it there."""
    (user / "here.pth").write_text(f"{HERE}\n")


def _wheel(folder: Path, name: str, version: str, code: str = "") -> Path:
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    path = folder / f"{module}-{version}-py3-none-any.whl"
    files = {
        f"{module}/__init__.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in files.items():
            archive.writestr(inside, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{n},,\n" for n in (*files, f"{info}/RECORD")))
    return path


def _setuptools(folder: Path) -> Path:
    """A wheelhouse of what a new venv has too old for the torch that these tests run with."""
    folder.mkdir()
    _wheel(folder, "setuptools", "99.0")
    return folder


def _wheelhouse(folder: Path, tmp_path: Path) -> Path:
    """A wheel for all that our own asks for: a name, a version, and nothing in it."""
    folder.mkdir()
    tmp_path.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel.build(tmp_path)) as ours:
        (name,) = (n for n in ours.namelist() if n.endswith("/METADATA"))
        message = Parser().parsestr(ours.read(name).decode())
    for wanted in map(Requirement, message.get_all("Requires-Dist", [])):
        if wanted.marker is None or wanted.marker.evaluate({"extra": "fast"}):
            version = max((s.version for s in wanted.specifier), default="1")
            _wheel(folder, wanted.name, version, FAKES.get(wanted.name, ""))
    _wheel(folder, "numpy", "2.0", NUMPY.format("2.0"))
    return folder


def _on(remote: Remote, *words: str) -> str:
    return remote.run([remote.host.interpreter, *words], check=True).text


def _experiment(folder: Path) -> Path:
    """A model directory, and data, both by names that mean nothing on another machine."""
    net = folder / "net"
    net.mkdir()
    (net / "config.json").write_text("{}")
    (net / "model.safetensors").write_bytes(np.random.default_rng(1).bytes(3_000_000))
    (folder / "mine.csv").write_text("text,label\na,1\nb,0\n")
    path = folder / "mine.toml"
    path.write_text(
        f'run.name = "r"\nmodel.id = "{net}"\ndata.id = "{folder / "mine.csv"}"\n'
        'rounds.count = 1\nmethod.name = "fedavg"\n'
    )
    return path


def _resolved(remote: Remote, experiment: Path) -> list[Path]:
    """Where the host finds the model and the data that the experiment names."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom protocol import experiment\n"
        "from node import sources\ne = experiment.load(Path(sys.argv[1]))\n"
        "print(sources.resolve_model(e.model.id), sources.resolve_data(e.data.id).train, sep='\\n')"
    )
    home = f"import os; os.environ['SEEDWIRE_HOME'] = {remote.host.at('cache')!r}\n"
    return [Path(line) for line in _on(remote, "-c", home + code, str(experiment)).splitlines()]


@pytest.mark.usefixtures("packages")
def test_a_push_is_whole_and_then_nothing_crosses_but_what_rotted(
    remote: Remote, tmp_path: Path
) -> None:
    host, experiment = remote.host, _experiment(tmp_path)
    (tmp_path / "build").mkdir()
    wheels = _setuptools(tmp_path / "wheels")
    everything = cargo.load(tmp_path / "build", [experiment], wheelhouse=wheels)
    lines: list[str] = []
    push.push(remote, everything, lines.append)
    assert lines[-1].startswith("ready: 6 files, 3.")
    model, data = _resolved(remote, experiment)
    assert model.is_relative_to(host.at("cache"))
    assert data.is_relative_to(host.at("cache"))
    assert data.read_bytes() == (tmp_path / "mine.csv").read_bytes()
    rotten, wanted = model / "model.safetensors", (tmp_path / "net/model.safetensors").read_bytes()
    assert rotten.read_bytes() == wanted
    code = Path(_on(remote, "-c", "import node.worker; print(node.worker.__file__)"))
    assert code.is_relative_to(host.at("venv"))

    lines.clear()
    push.push(remote, everything, lines.append)
    assert lines[-1].startswith("ready: nothing to copy, torch ")
    assert not [line for line in lines if line.startswith(("pip", "loading"))]

    rotten.write_bytes(wanted[:-1] + bytes([wanted[-1] ^ 1]))
    code.write_text("raise SystemExit('not what was installed')")
    push.push(remote, everything, lines.append)
    assert lines[-1].startswith("ready: 1 files")
    assert rotten.read_bytes() == wanted
    assert "SystemExit" not in code.read_text()


def test_a_vendors_torch_stays_and_gets_the_numpy_that_it_was_built_for(
    remote: Remote, user: Path, tmp_path: Path
) -> None:
    wheels = _wheelhouse(tmp_path / "wheels", tmp_path / "build")
    _wheel(wheels, "torch", "99.0")
    version = "2.4.0a0+3bcc3cddb5.nv24.7"
    vendors = _wheel(tmp_path, "torch", version, FAKES["torch"])
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*command, "--target", str(user), str(vendors)], check=True)
    everything = cargo.load(tmp_path / "build", wheelhouse=wheels)
    lines: list[str] = []
    push.push(remote, everything, lines.append)
    assert lines[-1].endswith(f"torch {version} (kept)")
    assert "an older numpy, for the host's torch" in lines
    code = "import numpy, torch; print(numpy.__version__, torch.__file__)"
    assert _on(remote, "-c", code) == f"1.26 {user}/torch/__init__.py"
    assert not list(Path(remote.host.at("venv")).rglob("torch*"))

    lines.clear()
    push.push(remote, everything, lines.append)
    assert "pip install" not in lines
    info = Path(remote.host.at("venv"), SITE, "another-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: another\nVersion: 1.0\n")
    push.push(remote, everything, lines.append)
    assert "pip install" in lines  # somebody was there, who may have done more


def test_a_wheelhouse_is_enough_for_a_host_without_an_index(remote: Remote, tmp_path: Path) -> None:
    wheels = _wheelhouse(tmp_path / "wheels", tmp_path / "build")
    _wheel(wheels, "torch", "99.0", "def from_numpy(array):\n    return array\n")
    everything = cargo.load(tmp_path / "build", wheelhouse=wheels)
    lines: list[str] = []
    push.push(remote, everything, lines.append)
    assert lines[-1].endswith("torch 99.0")
    site = Path(remote.host.at("venv"), SITE)
    assert (site / "torch").is_dir()
    assert (site / "greenlet").is_dir()

    next(wheels.glob("greenlet-*")).unlink()
    less = cargo.load(tmp_path / "build", wheelhouse=wheels)
    with pytest.raises(HostError, match=r"^pip: .*greenlet"):
        push.push(remote, less, _say, fresh=True)


def test_a_copy_that_was_cut_off_goes_on_where_it_ended(remote: Remote, tmp_path: Path) -> None:
    content = np.random.default_rng(2).bytes(4_000_000)
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "model.safetensors").write_bytes(content)
    files = {"cache/packages/net-1": {"model.safetensors": tmp_path / "net/model.safetensors"}}
    hashes = {"cache/packages/net-1": {"model.safetensors": hashlib.sha256(content).hexdigest()}}
    load = Cargo(files, hashes, "", {})
    part = Path(remote.host.at("incoming/cache/packages/net-1/model.safetensors"))
    part.parent.mkdir(parents=True)
    part.write_bytes(content[:3_500_000])
    said = push.bring(remote, load, _say)
    assert said == "1 files, 0.5 MB sent"
    whole = Path(remote.host.at("cache/packages/net-1/model.safetensors"))
    assert whole.read_bytes() == content


def test_without_room_nothing_is_copied(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("a")
    load = Cargo({"cache/a": {"": tmp_path / "a"}}, {"cache/a": {"": "0" * 64}}, "", {})
    monkeypatch.setattr(push, "SPARE_BYTES", 10**18)
    with pytest.raises(HostError, match=r"MB free in .*host dir, want .*: make room there"):
        push.bring(remote, load, _say)
    assert not Path(remote.host.at("incoming")).exists()


def test_a_file_that_changes_while_it_is_copied_is_not_put_in_place(
    remote: Remote, tmp_path: Path
) -> None:
    (tmp_path / "a").write_text("after")
    load = Cargo({"cache/a": {"": tmp_path / "a"}}, {"cache/a": {"": "0" * 64}}, "", {})
    with pytest.raises(HostError, match="cache/a did not arrive as it was"):
        push.bring(remote, load, _say)
    assert not Path(remote.host.at("cache/a")).exists()


@pytest.mark.parametrize(
    ("python", "venv", "why"),
    [
        ("/nowhere/python3", "", "no Python /nowhere/python3 there: correct `python`"),
        (BASE, "/nowhere", "no Python /nowhere/bin/python there: correct `venv`"),
    ],
)
def test_a_host_without_the_python_that_is_named_says_so(
    config: Path, tmp_path: Path, python: str, venv: str, why: str
) -> None:
    table = {
        "cluster": {"ssh_config": str(config), "directory": str(tmp_path / "host")},
        "coordinator": {"address": "tcp://127.0.0.1:5555"},
        "hosts": {"one": {"address": "board", "python": python, "venv": venv}},
    }
    found = inventory.parse(table, tmp_path / "cluster.toml").hosts
    with remotes(found) as (remote,), pytest.raises(HostError, match=why):
        install(remote, Cargo({}, {}, "", {}), _say)


def test_the_command_tells_each_host_and_ends_with_the_code_of_hosts(
    config: Path, tmp_path: Path
) -> None:
    """Neither host gets far: one has another Python, one nobody listens for."""
    (tmp_path / "cluster.toml").write_text(
        f'cluster.ssh_config = "{config}"\ncluster.directory = "{tmp_path / "host"}"\n'
        'coordinator.address = "tcp://127.0.0.1:5555"\n'
        '[hosts.one]\naddress = "board"\npython = "/nowhere/python3"\n'
        '[hosts.two]\naddress = "127.0.0.1"\nport = 1\n'
    )
    words = ["push", "--insecure", "--inventory", str(tmp_path / "cluster.toml")]
    result = CliRunner().invoke(cluster_app, words)
    assert result.exit_code == HostError.exit_code
    assert "seedwire: one: no Python /nowhere/python3 there: correct `python`" in result.stderr
    assert "seedwire: two: " in result.stderr
    assert "refused" in result.stderr


def test_names_of_the_home_there_are_left_for_its_shell(host: Host) -> None:
    """``env NAME=~/x`` would not be expanded."""
    asked: list[list[str]] = []

    class Fake(Remote):
        def run(self, command: Sequence[str], **options: object) -> Done:
            asked.append(list(command))
            return Done(0, b"", b"")

    there = msgspec.structs.replace(host, directory="~/.seedwire")
    prepare(Fake(there), Cargo({}, {}, "", {}, sources=("mine.csv",)))
    (words,) = asked
    assert words[3:6] == ["sh", "~/.seedwire/cache", "~/.seedwire/venv/bin/python"]
    quoted = ["sh", "-c", words[2], "sh", "it", "sh", "-c", "echo $SEEDWIRE_HOME"]
    assert subprocess.run(quoted, capture_output=True, text=True, check=True).stdout == "it\n"


def test_a_checkout_in_a_venv_of_the_users_is_left_alone(
    config: Path, user: Path, tmp_path: Path
) -> None:
    """Our own environment would lose its checkout to the wheel."""
    del user
    site = tmp_path / "own" / SITE
    subprocess.run([BASE, "-m", "venv", "--without-pip", str(tmp_path / "own")], check=True)
    info = site / "seedwire-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: seedwire\nVersion: 0.1.0\n")
    (info / "direct_url.json").write_text('{"dir_info": {"editable": true}, "url": "file:///x"}')
    table = {
        "cluster": {"ssh_config": str(config), "directory": str(tmp_path / "host")},
        "coordinator": {"address": "tcp://127.0.0.1:5555"},
        "hosts": {"one": {"address": "board", "python": BASE, "venv": str(tmp_path / "own")}},
    }
    before = sorted(site.rglob("*"))
    with remotes(inventory.parse(table, tmp_path / "cluster.toml").hosts) as (remote,):
        said = install(remote, Cargo({}, {}, "", {}), _say)
    assert said.endswith("the checkout there is left alone")
    assert sorted(site.rglob("*")) == before
