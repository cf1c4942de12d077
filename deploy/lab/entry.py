"""How the hosts of a lab are reached: keys, a config of ssh, and the inventory that names it."""

from __future__ import annotations

import shutil
from pathlib import Path

import tomli_w

from deploy.lab import host
from deploy.lab.file import Lab
from deploy.lab.network import call

SSH_CONFIG = """\
Host *
  User root
  IdentityFile {directory}/id
  IdentitiesOnly yes
  IdentityAgent none
  UserKnownHostsFile {directory}/known_hosts
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  BatchMode yes
"""


def make_keys(directory: Path, files: dict[str, Path]) -> None:
    """One that opens all hosts, and each host's own, which are known from the start."""
    _make_key(directory / "id", "lab")
    for name, path in files.items():
        path.mkdir(parents=True, mode=0o700)
        _make_key(path / "key", name)
        shutil.copy(directory / "id.pub", path / "authorized_keys")


def _make_key(path: Path, comment: str) -> None:
    call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path))


def write(lab: Lab, directory: Path) -> None:
    """The config of ssh and the inventory, of hosts that have their keys."""
    known, aliases = [], []
    for each in lab.hosts:
        key = (directory / "hosts" / each.name / "key.pub").read_text()
        known.append(f"{each.address} {key}")
        aliases.append(f"Host {each.name}\n  HostName {each.address}\n")
    (directory / "known_hosts").write_text("".join(known))
    config = "".join(aliases) + SSH_CONFIG.format(directory=directory)
    (directory / "ssh_config").write_text(config)
    hosts = {h.name: h for h in lab.hosts}
    centre = hosts[lab.coordinator].address if lab.coordinator else lab.here
    endpoint = f"tcp://{centre}:{lab.port}"
    table = {
        "cluster": {"ssh_config": "ssh_config", "python": host.PYTHON},
        "coordinator": {"host": lab.coordinator, "bind": endpoint, "address": endpoint},
        "hosts": {name: {"address": name, **h.inventory} for name, h in hosts.items()},
    }
    (directory / "cluster.toml").write_text(tomli_w.dumps(table))
