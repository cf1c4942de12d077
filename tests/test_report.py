"""The comparison of runs: a table, a picture and a page that need nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import seedwire
from coordinator import report
from coordinator.view import human_bytes
from protocol.errors import ExperimentError


def finished(directory: Path, name: str, over: int | None = 34_000_000) -> Path:
    """A run directory as ``coordinator.record`` leaves it."""
    sent = {"payload_up": 1, "payload_down": 2, "message_up": 43_000, "message_down": 24_000}
    per = {key: value / 100 for key, value in sent.items()}
    summary: dict[str, Any] = {
        "run": name,
        "method": "fedmezo",
        "model": "m",
        "data": "<b>d</b>",
        "seed": 1,
        "rounds": 2,
        "clients": 8,
        "nodes": 4,
        "trained_parameters": 4224,
        "metric": {"name": "accuracy", "before": 0.635, "after": 0.775},
        "loss": {"before": 0.602, "after": 0.472},
        "bytes": sent | {"per_client_round": per},
        "memory_bytes": {"train": 1_190_000_000, "over_inference": over},
        "seconds": {"total": 165.4, "train": 160.0, "wait": 5.4},
        "digest": "00ff",
    }
    lines = [{"round": 1, "train_loss": 0.5, "bytes": sent, "seconds_total": 80.0}]
    lines += [
        {"round": r, "metric": m, "bytes": sent, "seconds_total": 80.0 * r}
        for r, m in ((0, 0.635), (2, 0.775))
    ]
    directory.mkdir()
    (directory / "summary.json").write_text(json.dumps(summary))
    (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return directory


def test_the_table_of_four_runs_fits_80_columns_and_says_what_the_summaries_say(
    tmp_path: Path,
) -> None:
    curves = [report.read(finished(tmp_path / n, n)) for n in ("fedavg", "flasc", "spry", "mezo")]
    with (tmp_path / "out").open("w") as out:
        Console(width=80, file=out).print(report.table(curves, "Demo"))
    lines = (tmp_path / "out").read_text().splitlines()
    rows = {line[:16].strip(): line.split()[-1] for line in lines if line[1:2].isalpha()}
    assert rows["accuracy, %"] == "63.5→77.5"
    assert rows["loss"] == "0.602→0.472"
    assert rows["trained"] == "4,224"
    assert rows["seconds"] == "165"
    assert list(report.measures(curves[0].summary).values())[3:8] == [
        *("430 B", "240 B", "67 kB", "1.19 GB", "34 MB")
    ]


def causal(directory: Path, name: str) -> Path:
    """A run of another task: its metric is another, and there is more of it."""
    finished(directory, name)
    path = directory / "summary.json"
    summary = json.loads(path.read_text())
    summary["metric"]["name"] = "token accuracy"
    summary |= {"perplexity": {"before": None, "after": 12.3456}, "rouge_l": 0.25}
    path.write_text(json.dumps(summary))
    return directory


def test_what_a_run_measured_stands_under_its_own_name(tmp_path: Path) -> None:
    first, second = (report.read(run) for run in (
        finished(tmp_path / "a", "one"), causal(tmp_path / "b", "two")
    ))  # fmt: skip
    both = report.rows([first, second])
    assert both[:6] == [
        ("trained", ["4,224", "4,224"]),
        ("accuracy, %", ["63.5→77.5", "absent"]),
        ("loss", ["0.602→0.472", "0.602→0.472"]),
        ("token accuracy, %", ["absent", "63.5→77.5"]),
        ("perplexity", ["absent", "absent→12.35"]),
        ("Rouge-L, %", ["absent", "25.0"]),
    ]
    assert [name for name, _ in both[6:]] == list(report.measures(first.summary))[3:]
    assert "accuracy, %" not in dict(report.rows([second]))
    assert report.metric_names([first, second, first]) == "accuracy or token accuracy"
    report.write([second], tmp_path / "r", "T")
    page = (tmp_path / "r" / "comparison.html").read_text()
    assert "<h2>Token accuracy against what it cost</h2>" in page
    assert not re.search(r"(?<!oken )accuracy", page)


def test_the_command_writes_a_page_that_loads_nothing_and_escapes_names(tmp_path: Path) -> None:
    run = finished(tmp_path / "a", "one")
    done = CliRunner().invoke(
        seedwire.app, ["report", str(run), str(run), "--out", str(tmp_path / "r"), "--title", "T&T"]
    )
    assert done.exit_code == 0, done.output
    page = (tmp_path / "r" / "comparison.html").read_text()
    assert "<title>T&amp;T</title>" in page
    assert "&lt;b&gt;d&lt;/b&gt;" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert (tmp_path / "r" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert [s["run"] for s in json.loads((tmp_path / "r" / "comparison.json").read_text())] == [
        "one"
    ] * 2


def test_what_was_not_measured_is_absent_and_not_zero(tmp_path: Path) -> None:
    curve = report.read(finished(tmp_path / "a", "one", over=None))
    assert report.measures(curve.summary)["over inference"] == "absent"
    report.write([curve], tmp_path / "r", "T")


def test_a_directory_that_is_no_finished_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="is not a finished run"):
        report.read(tmp_path)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1_234_567, "1.23 MB"),
        (2e9, "2 GB"),
        (3e12, "3 TB"),
    ],
)
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text
