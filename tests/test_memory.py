"""``seedwire memory``: real steps in processes of their own, small models."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from node.memory import Needs, Order, measure, run, settings
from node.memory_table import cells
from protocol.errors import ExperimentError
from seedwire import app

TINY = {"id": "random:bert-tiny"}
LORA = {"kind": "lora", "rank": 2}


def order(method: str, **changes: object) -> Order:
    how: dict[str, object] = {"task": "classify", "batch": 4, "length": 16, "cohort": 3}
    how |= {"device": "cpu", "threads": 1, **changes}
    return Order(method, TINY, LORA, **how)  # type: ignore[arg-type]


def test_what_follows_a_name_says_how_it_computes() -> None:
    plain, compute = settings("fedavg", 8)
    assert (plain.batch_size, plain.steps) == (8, 1)
    assert (compute.checkpointing, compute.micro_batch) == (False, 0)
    assert settings("fedavg-ckpt", 8)[1].checkpointing
    assert settings("fedavg-ckpt-micro", 8)[1].micro_batch == 1
    with pytest.raises(ExperimentError, match="fedsgd"):
        settings("fedsgd", 8)


@pytest.mark.parametrize("method", ["spry", "fedavg-ckpt-micro", "fedmezo", "fwdllm", "fedfgd"])
def test_a_step_of_each_kind_of_gradient_runs(method: str) -> None:
    needs = run(order(method))
    assert needs.method == method
    assert needs.trained == 2 * 2 * 2 * (2 * 32) + 2 * (32 + 1)  # LoRA on q and v, and the head
    assert needs.weights > 4 * needs.trained
    assert needs.step_seconds > 0


def test_a_method_is_measured_in_a_process_of_its_own() -> None:
    needs = measure(order("fedavg", task="classify"))
    assert needs.inference is not None
    assert needs.step is not None
    assert needs.step >= needs.inference > needs.weights


def test_what_fails_says_why_in_one_line() -> None:
    with pytest.raises(ExperimentError, match=r"^fedavg: ModelError: random:bert-none: unknown"):
        measure(Order("fedavg", {"id": "random:bert-none"}, LORA, "classify", 1, 8, 1, "cpu", 1))


@pytest.mark.timeout(400)  # each method loads torch anew
def test_the_command_prints_a_table_or_a_line_for_each() -> None:
    arguments = ["memory", "--model", "random:llama-tiny", "--task", "causal", "--batch", "2"]
    arguments += ["--length", "16", "--threads", "1", "--method"]
    shown = CliRunner().invoke(app, [*arguments, "spry"], terminal_width=200)
    assert shown.exit_code == 0, shown.output
    assert "random:llama-tiny, fp32, 2 x 16 tokens" in shown.output
    lines = CliRunner().invoke(app, [*arguments, "spry,fedavg-ckpt", "--json"]).output.splitlines()
    assert [json.loads(line)["method"] for line in lines] == ["spry", "fedavg-ckpt"]


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (["--method", "fedsgd"], "fedsgd"),
        (["--quantize", "int3"], "int3"),
        (["--task", "sing"], "sing"),
        (["--peft", "some"], "some"),
    ],
)
def test_bad_input_gets_one_line(wrong: list[str], why: str) -> None:
    done = CliRunner().invoke(app, ["memory", "--model", "random:bert-tiny", *wrong])
    assert done.exit_code == 3  # as for an experiment file
    (line,) = done.output.strip().splitlines()
    assert why in line


def test_peaks_that_nothing_measures_are_absent() -> None:
    assert cells(Needs("x", 1, 5_000_000, None, None, 0.1, 0.25)) == [
        *("5 MB", "absent", "absent", "absent", "absent", "0.25")
    ]
    assert cells(Needs("x", 1, 5_000_000, 2_000_000_000, 2_500_000_000, 0.1, 0.25)) == [
        *("5 MB", "2.00 GB", "2.50 GB", "1.25", "500 MB", "0.25")
    ]
