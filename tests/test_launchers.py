"""Slurm, Compose and Kubernetes: what they start are our commands, with options that there are."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from typer.testing import CliRunner

import seedwire
from tests.test_run import experiment

__all__ = ["experiment"]  # the fixture

ROOT = Path(__file__).parent.parent
LAUNCHERS = ROOT / "deploy" / "launchers"
SCRIPT = LAUNCHERS / "slurm.sbatch"
# A stand-in for srun: every task on this machine, with the variables that Slurm sets.
SRUN = """#!/bin/bash
trap 'kill $(jobs -p); wait' TERM
shift  # --kill-on-bad-exit=0
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i "$@" & done
wait
"""


def understood(command: list[str]) -> bool:
    """Whether our command line takes it: an unknown option is refused before --help is heeded."""
    assert command[0] == "seedwire"
    done = CliRunner().invoke(seedwire.app, [*command[1:], "--help"])
    return done.exit_code == 0


def test_an_option_that_is_none_is_not_understood() -> None:
    assert understood(["seedwire", "node", "--coordinator", "tcp://a:1"])
    assert not understood(["seedwire", "node", "--coordinate", "tcp://a:1"])
    assert not understood(["seedwire", "nodes"])


# --- Compose ---------------------------------------------------------------------


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((LAUNCHERS / "compose.yaml").read_text())
    return loaded


@pytest.mark.parametrize("name", ["fetch", "coordinator", "node-1", "node-2"])
def test_what_compose_starts_is_ours(name: str) -> None:
    services = compose()["services"]
    assert set(services) == {"fetch", "coordinator", "node-1", "node-2"}
    service = services[name]
    assert understood(shlex.split(service["command"]))
    mounted = {volume.split(":")[0] for volume in service["volumes"] if volume[0] != "."}
    assert mounted <= compose()["volumes"].keys()
    assert "ports" not in service, "without keys nothing is to be reached from outside"
    assert (LAUNCHERS / service["build"]["context"]).resolve() == ROOT
    assert (ROOT / service["build"]["dockerfile"]).exists()


def test_the_nodes_of_compose_host_the_clients_that_its_coordinator_has() -> None:
    services = compose()["services"]
    (number,) = re.findall(r"partition.clients=(\d+)", services["coordinator"]["command"])
    said = " ".join(s["command"] for s in services.values())
    spans = re.findall(r"--clients (\d+)-(\d+)", said)
    hosted = [client for a, b in spans for client in range(int(a), int(b) + 1)]
    assert sorted(hosted) == list(range(int(number)))
    assert "tcp://coordinator:5555" in said  # the service's name is the host's


# --- Kubernetes ------------------------------------------------------------------


def manifests() -> dict[str, dict[str, Any]]:
    text = (LAUNCHERS / "kubernetes.yaml").read_text()
    return {one["kind"]: one for one in yaml.safe_load_all(text)}


def containers() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for kind in ("Job", "StatefulSet"):
        pod = manifests()[kind]["spec"]["template"]["spec"]
        for container in (*pod["initContainers"], *pod["containers"]):
            yield manifests()[kind]["spec"], container


def test_what_kubernetes_starts_is_ours_and_its_volumes_are_there() -> None:
    for spec, container in containers():
        names = {one["name"]: "0" for one in container.get("env", [])}
        line = [*container["command"], *container.get("args", [])]
        for name, value in names.items():
            line = [word.replace(f"$({name})", value) for word in line]
        assert "$(" not in " ".join(line), "a variable that is not set"
        assert understood(line)
        volumes = {v["name"] for v in spec["template"]["spec"]["volumes"]}
        volumes |= {v["metadata"]["name"] for v in spec.get("volumeClaimTemplates", [])}
        assert {m["name"] for m in container["volumeMounts"]} <= volumes


def test_the_pods_are_those_that_are_selected_and_reach_the_service_by_its_name() -> None:
    found = manifests()
    job, nodes, service = found["Job"], found["StatefulSet"], found["Service"]
    assert service["spec"]["selector"] == job["spec"]["template"]["metadata"]["labels"]
    labels = nodes["spec"]["template"]["metadata"]["labels"]
    assert nodes["spec"]["selector"]["matchLabels"] == labels
    (node,) = nodes["spec"]["template"]["spec"]["containers"]
    port = service["spec"]["ports"][0]["port"]
    assert f"tcp://{service['metadata']['name']}:{port}" in node["command"]
    assert nodes["spec"]["serviceName"] == service["metadata"]["name"]
    claim = found["PersistentVolumeClaim"]["metadata"]["name"]
    assert claim in json.dumps(job["spec"]["template"]["spec"]["volumes"])


# --- Slurm -----------------------------------------------------------------------


def test_the_script_is_bash() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)  # noqa: S607


@pytest.mark.net
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_job_runs_an_experiment_and_the_same_job_again_finds_it_done(
    experiment: Path, tmp_path: Path
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    python = f'exec {shlex.quote(sys.executable)} -m seedwire "$@"'
    programs = {"srun": SRUN, "scontrol": "#!/bin/sh\necho 127.0.0.1\n"}
    programs["seedwire"] = f"#!/bin/sh\n{python}\n"
    for name, text in programs.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONSAFEPATH": "1"}
    env |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "here"}
    command = ["bash", str(SCRIPT), str(experiment), "--threads", "1"]
    said = []
    for _ in range(2):
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        said.append(done.stdout)
    assert "nothing to resume" in said[1]
    (job,) = tmp_path.glob("seedwire-*")
    summary = json.loads((job / "run" / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert set(json.loads((job / "run" / "nodes.json").read_text())) >= {"task-0", "task-1"}
    assert (job / "token").stat().st_mode & 0o077 == 0
