"""``seedwire profile``: forward gradients of a tiny model against their law."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedalgos.space import ParamSpace
from node import data, model, profiler, task
from node.oracle import TorchOracle
from node.profiler import Fit, Sample, Unfit, expected_cosine, profile, spread
from node.profiler_table import choose
from protocol import experiment as experiments
from protocol.errors import ModelError
from protocol.noise import Direction
from seedwire import app

torch.set_num_threads(1)

pytestmark = pytest.mark.usefixtures("signal_handlers")

KINDS = ("lora", "adapter", "bitfit")
TABLE = """
[run]
name = "profiled"
seed = 1
[model]
id = "random:bert-tiny"
[peft]
rank = 2
[data]
id = "DATA"
max_length = 16
test = 8
template = "one\\n{text}"
[partition]
clients = 2
[rounds]
count = 1
[method]
name = "fwdllm"
batch_size = 4
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An experiment file, with its data beside it."""
    rows = [f"it was {'fine' if i % 2 else 'poor'} number {i}\t{i % 2}" for i in range(32)]
    (tmp_path / "data.tsv").write_text("text\tlabel\n" + "\n".join(rows) + "\n")
    out = tmp_path / "e.toml"
    out.write_text(TABLE.replace("DATA", str(tmp_path / "data.tsv")))
    return out


def profiled(path: Path, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    command = ["profile", str(path), "--directions", "4", "--batches", "1", "--threads", "1"]
    done = CliRunner().invoke(app, [*command, *map(str, arguments)], terminal_width=200)
    return done.exit_code, done.stdout, done.stderr


# --- the law ---------------------------------------------------------------------


@pytest.mark.parametrize("num_directions", [16, 256])
def test_cosine_follows_directions_and_parameters_alone(path: Path, num_directions: int) -> None:
    e = experiments.load(path)
    rows = list(profile(e, KINDS, Sample(num_batches=1, num_directions=num_directions)))
    sizes = []
    for row in rows:
        assert isinstance(row, Fit)
        sizes.append(row.trained)
        law = (num_directions / (num_directions + row.trained + 1)) ** 0.5
        assert row.expected_cosine == pytest.approx(law)
        assert abs(row.cosine - law) < 3 * row.spread
        assert row.decrease == pytest.approx(row.cosine * row.gradient_norm)
    head = 2 * (32 + 1)
    lora = 2 * 2 * 2 * (32 + 32)  # of query and value, in two blocks
    adapter = 2 * (2 * 32 + 2 + 32 * 2 + 32)
    assert sizes[:2] == [lora + head, adapter + head]


def test_expectation_and_spread_are_those_of_the_draws() -> None:
    rng = np.random.Generator(np.random.Philox(5))
    for k, d in ((16, 600), (256, 600), (64, 60)):
        along, across = rng.chisquare(k, 20_000), rng.chisquare(d - 1, 20_000)
        cosines = np.sqrt(along / (along + across))
        assert expected_cosine(k, d) == pytest.approx(cosines.mean(), rel=0.02)
        assert spread(k, d) == pytest.approx(cosines.std(), rel=0.05)


def test_expected_cosines_are_those_of_the_test_vectors() -> None:
    got = [expected_cosine(k, 1000) for k in (10, 100, 1000, 10_000)]
    assert got == pytest.approx([0.0995, 0.301, 0.707, 0.953], abs=1e-3)


def test_gradients_are_those_of_the_mean_over_the_batches(path: Path) -> None:
    e = experiments.load(path, ('peft={kind="bitfit"}',))
    shards = data.load(e.data, e.partition, (0,))
    trained = model.load(e.model, e.peft, e.data, 2, device="cpu", seed=1)
    work = task.build(trained, e.data, shards.classes)
    oracle = TorchOracle(trained, work)
    tokens = work.tokenise(shards.train[0])
    size = ParamSpace.of(trained.infos).size
    x = oracle.start(oracle.initial())
    directions = [Direction(key, ((0, size),)) for key in (3, 4, 5)]
    mini = [work.batch(tokens, range(4)), work.batch(tokens, range(4, 8))]
    g, forward = profiler.gradients(oracle, x, mini, directions)
    whole = work.batch(tokens, range(8))
    want = oracle.grad(x, whole)[1].numpy()
    dense = np.stack([v.dense(size) for v in directions])
    np.testing.assert_allclose(g.numpy(), want, atol=1e-6)
    np.testing.assert_allclose(forward.numpy(), dense.T @ (dense @ want) / 3, atol=1e-5)


# --- one kind after the other ----------------------------------------------------


def test_a_model_is_gone_before_the_next_one_is_loaded(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = model.load
    loaded: list[weakref.ref[Any]] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        assert not [ref for ref in loaded if ref() is not None]
        trained = load(*args, **kwargs)
        loaded.append(weakref.ref(trained.model))
        return trained

    monkeypatch.setattr(model, "load", watched)
    sample = Sample(num_batches=1, num_directions=1)
    assert len(list(profile(experiments.load(path), KINDS, sample))) == len(loaded) == 3


def test_every_kind_sees_the_same_texts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[list[int]]] = []
    gradients = profiler.gradients

    def watched(oracle: Any, x: Any, mini: Any, directions: Any) -> Any:
        seen.append([batch.inputs["input_ids"].tolist() for batch in mini])
        return gradients(oracle, x, mini, directions)

    monkeypatch.setattr(profiler, "gradients", watched)
    list(profile(experiments.load(path), KINDS, Sample(num_directions=1)))
    assert len(seen[0]) == 2
    assert seen[0] == seen[1] == seen[2]


def test_a_kind_that_cannot_be_is_a_row_with_its_reason(path: Path) -> None:
    e = experiments.load(path, ("model.id=random:llama-tiny",))
    sample = Sample(num_batches=1, num_directions=2)
    lora, bitfit = profile(e, ("lora", "bitfit"), sample)
    assert isinstance(lora, Fit)
    assert bitfit == Unfit("bitfit", 'peft.kind "bitfit": random:llama-tiny has no biases')
    few_bits = experiments.load(path, ("model.dtype=int8",))
    (full,) = profile(few_bits, ("full",), sample)
    assert isinstance(full, Unfit)
    assert "full" in full.error


def test_the_choice_is_by_either_figure() -> None:
    few = Fit("bitfit", 10, 1.0, 0.5, 0.5, 0.1, 0.5)
    steep = Fit("lora", 20, 3.0, 0.3, 0.3, 0.1, 0.9)
    rows: list[Fit | Unfit] = [Unfit("full", "too large"), steep, few]
    assert choose(rows, "cosine") is few
    assert choose(rows, "decrease") is steep
    with pytest.raises(ModelError, match=r"^too large$"):
        choose([rows[0], Unfit("head", "too large")], "cosine")


# --- the command -----------------------------------------------------------------


def test_the_command_prints_a_table_or_a_line_for_each(path: Path) -> None:
    llama = path.with_name("llama.toml")
    llama.write_text(path.read_text().replace("bert-tiny", "llama-tiny"))
    code, shown, _ = profiled(llama)
    assert code == 0
    assert "random:llama-tiny, directions: 4, mini-batches: 1" in shown
    assert "chosen by cosine: " in shown
    code, shown, _ = profiled(llama, "--json", "--by", "decrease")
    lora, adapter, bitfit = map(json.loads, shown.splitlines())
    assert [row["kind"] for row in (lora, adapter, bitfit)] == list(KINDS)
    assert lora["chosen"] is not adapter["chosen"]
    assert bitfit["error"].endswith("has no biases")


def test_what_is_written_is_the_experiment_with_another_kind(path: Path) -> None:
    out = path.with_name("out.toml")
    code, _, _ = profiled(path, "--kinds", "bitfit", "--write", out)
    assert code == 0
    old, new = experiments.load(path), experiments.load(out)
    assert new.peft == experiments.Peft(kind="bitfit")  # the rank, which it has no use for, is gone
    assert msgspec.structs.replace(new, peft=old.peft) == old
    assert "patience" not in out.read_text()  # no defaults: what the file left open stays so


def test_a_file_is_written_over_only_by_force(path: Path) -> None:
    before = path.read_text()
    code, _, said = profiled(path, "--write", path)
    assert code == 3
    assert said == f"seedwire: --write {path}: the file exists; --force overwrites it\n"
    assert path.read_text() == before
    code, _, _ = profiled(path, "--kinds", "bitfit", "--write", path, "--force")
    assert code == 0
    assert experiments.load(path).peft.kind == "bitfit"


@pytest.mark.parametrize(
    ("wrong", "code", "why"),
    [
        (["--kinds", "lora,some"], 3, "--kinds 'some': want some of lora"),
        (["--kinds", ","], 3, "--kinds ''"),
        (["--by", "luck"], 3, "--by luck: want cosine or decrease"),
        (["--device", "cpv"], 3, "--device cpv"),
        (["--client", "2"], 5, "client 2 does not exist"),
        (["--write", "/no/such/place.toml"], 3, "in a directory that exists"),
    ],
)
def test_bad_input_gets_one_line(path: Path, wrong: list[str], code: int, why: str) -> None:
    got, _, said = profiled(path, *wrong)
    (line,) = said.splitlines()
    assert (got, line.startswith("seedwire: "), why in line) == (code, True, True)


def test_a_model_that_can_have_none_of_the_kinds_is_an_error(path: Path) -> None:
    path.write_text(path.read_text().replace("bert-tiny", "none-tiny"))
    code, shown, said = profiled(path)
    assert (code, shown) == (4, "")
    assert said.startswith("seedwire: random:none-tiny: unknown shape")
    assert said.count("unknown shape") == 1
