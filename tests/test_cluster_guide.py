"""docs/cluster.md: its commands are run as they stand, and its tables name every key."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from msgspec import NODEFAULT, Struct

from deploy.hosts import Cluster, Coordinator, GroupTable, HostTable
from deploy.inventory import load, parse
from tests.sshd import inventory, sshd
from tests.test_cluster import Site
from tests.test_docs import page, rows, section

HARDWARE = "# needs hardware"
PATIENCE_SECONDS = 300.0


def commands() -> list[str]:
    """The lines of the guide's sh blocks, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page("cluster.md"), re.MULTILINE | re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


def run_here() -> list[str]:
    return [line for line in commands() if not line.endswith(HARDWARE)]


def test_what_needs_no_hardware_is_ours_and_is_run() -> None:
    assert len(run_here()) >= 9
    assert all(line.startswith("seedwire ") for line in run_here())
    verbs = set(re.findall(r"^seedwire cluster (\w+)", "\n".join(run_here()), re.MULTILINE))
    assert verbs == {"check", "push", "up", "status", "logs", "down", "run"}


@pytest.mark.net
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_commands_do_what_the_guide_says(tmp_path: Path) -> None:
    with sshd(tmp_path / "sshd") as config:
        site = Site(tmp_path, config)
        file = inventory(tmp_path, config, "pi4-1", "pi4-2")
        (tmp_path / "tiny.toml").rename(tmp_path / "mine.toml")
        bind = load(file).coordinator.bind
        background: list[subprocess.Popen[str]] = []

        def running() -> int:
            return sum(row["state"] == "running" for row in site.statuses().values())

        after: dict[str, Callable[[], bool]] = {
            "run": lambda: (tmp_path / "runs/first/summary.json").exists() and not running(),
            "up": lambda: running() == 2,
            "logs": lambda: running() == 2,
            "down": lambda: running() == 0,
            "report": lambda: any((tmp_path / "report").iterdir()),
        }
        try:
            for line in run_here():
                words = shlex.split(line.replace("tcp://0.0.0.0:5555", bind), comments=True)[1:]
                if words[-1] == "&":
                    many = ["--set", "rounds.count=100000"]  # that goes on until `down`
                    command = site.command(*words[:-1], *many)
                    background.append(subprocess.Popen(command, **site.surroundings))
                    continue
                done = subprocess.run(
                    site.command(*words),
                    **site.surroundings,
                    capture_output=True,
                    timeout=PATIENCE_SECONDS,
                    check=False,
                )
                assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
                verb = words[1] if words[0] == "cluster" else words[0]
                assert after.get(verb, lambda: True)(), line
        finally:
            for process in background:
                process.terminate()
                process.wait()
            for node in site.processes():
                node.kill()


# --- the inventory ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("heading", "kind"),
    [("[cluster]", Cluster), ("[coordinator]", Coordinator), ("[hosts.NAME]", HostTable)],
)
def test_every_key_of_the_inventory_is_listed_with_its_default(
    heading: str, kind: type[Struct]
) -> None:
    table = section("cluster.md", heading)
    assert rows(table).keys() == set(kind.__struct_fields__)
    for field in msgspec.structs.fields(kind):
        if field.required:
            default = "required"
        elif field.default is NODEFAULT or isinstance(field.default, Struct):
            default = "{}"
        else:
            default = json.dumps(field.default)
        assert re.search(rf"^\| `{field.name}` \| {re.escape(default)} \|", table, re.MULTILINE)


def test_a_group_has_a_count_and_what_a_host_has() -> None:
    listed = rows(section("cluster.md", "[groups.NAME]")).keys()
    assert listed == set(GroupTable.__struct_fields__) - set(HostTable.__struct_fields__)


def test_the_inventory_of_the_guide_is_one() -> None:
    block = re.search(
        r"^```toml\n(\[coordinator\].*?)^```", page("cluster.md"), re.MULTILINE | re.DOTALL
    )
    assert block is not None
    found = parse(msgspec.toml.decode(block[1]), Path("cluster.toml"))
    assert [host.address for host in found.hosts] == ["pi4-1.local", "pi4-2.local"]
