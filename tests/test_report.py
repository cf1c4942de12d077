"""The comparison of runs: groups, the Pareto front, tables, a picture, a page of its own."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

import seedwire
from coordinator import board, report, tables
from coordinator.groups import Group, front, group, tasks
from coordinator.measures import AXES, axes, fronts, message_bytes
from coordinator.results import Result, read
from coordinator.view import human_bytes
from protocol.errors import ExperimentError
from tests import browser

SENT = {"payload_up": 1, "payload_down": 2, "message_up": 43_000, "message_down": 24_000}


def finished(
    directory: Path,
    name: str,
    over: int | None = 34_000_000,
    seed: int = 1,
    after: float = 0.775,
    sent: dict[str, int] = SENT,
    **sections: Any,
) -> Path:
    """A run directory as ``coordinator.record`` leaves it."""
    per = {key: value / 100 for key, value in sent.items()}
    data = {"id": "<b>d</b>"}
    experiment: dict[str, Any] = {
        "run": {"name": name, "seed": seed}, "data": data, "model": {"id": "m"},
        "method": {"name": "fedmezo"}, "rounds": {"count": 2}, **sections,
    }  # fmt: skip
    summary: dict[str, Any] = {
        "run": name,
        "status": "completed",
        "method": "fedmezo",
        "model": "m",
        "data": data["id"],
        "seed": seed,
        "rounds": 2,
        "clients": 8,
        "nodes": 4,
        "trained_parameters": 4224,
        "metric": {"name": "accuracy", "before": 0.635, "after": after},
        "loss": {"before": 0.602, "after": 0.472},
        "bytes": sent | {"per_client_round": per},
        "bytes_by_kind": {"update": {"up": 43_000, "down": 0}, "step": {"up": 0, "down": 24_000}},
        "memory_bytes": {"load": 700_000_000, "train": 1_190_000_000, "over_inference": over},
        "seconds": {"total": 165.4, "train": 160.0, "wait": 5.4},
        "digest": "00ff",
    }
    early = {key: value // 2 for key, value in sent.items()}
    lines = [
        {"round": r, "metric": m, "test_loss": 0.5, "bytes": b, "seconds_total": 80.0 * r}
        for r, m, b in ((0, 0.635, early), (1, 0.7, early), (2, after, sent))
    ]
    cost = {"round": 1, "client": 3, "node": "pi", "examples": 8, "loss": 0.5}
    train = {"seconds": 2.0, "rss": 1_190_000_000, "cuda": None}
    costs = [cost | {"round": r, "train": train} for r in (1, 2)]
    directory.mkdir()
    (directory / "experiment.toml").write_text(tomli_w.dumps(experiment))
    (directory / "summary.json").write_text(json.dumps(summary))
    nodes = {"pi": {"host": "<i>h</i>", "role": "train", "clients": [3]}}
    (directory / "nodes.json").write_text(json.dumps(nodes))
    for file, content in (("metrics", lines), ("costs", costs)):
        (directory / f"{file}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in content))
    return directory


def one(path: Path) -> Group:
    (found,) = group(read(path))
    return found


# --- tables ----------------------------------------------------------------------


def test_the_table_of_four_runs_fits_80_columns_and_says_what_the_summaries_say(
    tmp_path: Path,
) -> None:
    found = [one(finished(tmp_path / n, n)) for n in ("fedavg", "flasc", "spry", "mezo")]
    out = io.StringIO()
    Console(width=80, file=out).print(tables.table(found, "Demo"))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    shown = {line[:16].strip(): line.split()[-1] for line in lines if line[1:2].isalpha()}
    assert shown["accuracy, %"] == "63.5→77.5"
    assert shown["loss"] == "0.602→0.472"
    assert shown["trained"] == "4,224"
    assert shown["seconds"] == "165"
    assert [cells[0] for _, cells in tables.rows(found)][3:8] == [
        *("430 B", "240 B", "67 kB", "1.19 GB", "34 MB")
    ]


def test_five_runs_are_two_tables(tmp_path: Path) -> None:
    found = [one(finished(tmp_path / n, n)) for n in "abcde"]
    out = io.StringIO()
    Console(width=80, file=out).print(tables.table(found, "Demo"))
    assert out.getvalue().count("accuracy, %") == 2


def test_markdown_has_a_row_per_run_and_the_range_of_the_seeds(tmp_path: Path) -> None:
    runs = [finished(tmp_path / "a", "a|b"), finished(tmp_path / "b", "a|b", seed=2, after=0.805)]
    lines = tables.markdown(group([r for run in runs for r in read(run)])).splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("| a/b | 1, 2 | 4,224 | 63.5→79.0 (77.5 to 80.5) | 0.602→0.472 |")
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


def test_csv_and_parquet_have_plain_numbers_and_null_for_what_was_not_measured(
    tmp_path: Path,
) -> None:
    found = [one(finished(tmp_path / "a", "a")), one(finished(tmp_path / "b", "b", over=None))]
    (tmp_path / "r").mkdir()
    report.write(found, tmp_path / "r", "T")
    first, second = csv.DictReader((tmp_path / "r" / "comparison.csv").read_text().splitlines())
    assert float(first["accuracy"]) == 0.775
    assert float(first["accuracy_before"]) == 0.635
    assert float(first["message_bytes"]) == 67_000
    assert (first["over_inference_bytes"], second["over_inference_bytes"]) == ("34000000.0", "")
    assert first["is_best_bytes"] == "True"
    table = pq.read_table(tmp_path / "r" / "comparison.parquet").to_pylist()
    assert [row["over_inference_bytes"] for row in table] == [34_000_000, None]
    assert table[0]["accuracy_low"] == table[0]["accuracy_high"] == 0.775


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
    first, second = one(finished(tmp_path / "a", "one")), one(causal(tmp_path / "b", "two"))
    both = tables.rows([first, second])
    assert both[:6] == [
        ("trained", ["4,224", "4,224"]),
        ("accuracy, %", ["63.5→77.5", "absent"]),
        ("token accuracy, %", ["absent", "63.5→77.5"]),
        ("loss", ["0.602→0.472", "0.602→0.472"]),
        ("perplexity", ["absent", "12.35"]),
        ("Rouge-L, %", ["absent", "25.0"]),
    ]
    assert "accuracy, %" not in dict(tables.rows([second]))
    assert len(tasks([first, second])) == 2
    page = report.page([second], "T")
    assert "token accuracy against bytes" in page
    assert not re.search(r"(?<!oken )accuracy", page)


# --- groups ----------------------------------------------------------------------


def test_runs_that_differ_in_their_seed_alone_are_one_group(tmp_path: Path) -> None:
    runs = [
        finished(tmp_path / "c", "x", seed=3, after=0.9),
        finished(tmp_path / "a", "x", seed=1, after=0.7),
        finished(tmp_path / "b", "x", seed=2, after=0.8),
        finished(tmp_path / "d", "x", seed=1, method={"name": "fedmezo", "lr": 0.5}),
        finished(tmp_path / "e", "y", seed=1),
    ]
    found = group([r for run in runs for r in read(run)])
    assert [(g.label, g.seeds) for g in found] == [
        ("x", [1, 2, 3]),
        ("x (method.lr=0.5)", [1]),
        ("y", [1]),
    ]
    curve = found[0].curve("seconds")
    assert [cost for cost, _ in curve] == [0.0, 80.0, 160.0]
    assert [round(m.mean, 3) for _, m in curve] == [0.635, 0.7, 0.8]
    assert [(m.low, m.high) for _, m in curve] == [(0.635, 0.635), (0.7, 0.7), (0.7, 0.9)]


def test_a_measure_that_one_seed_lacks_is_absent_for_the_group(tmp_path: Path) -> None:
    runs = [finished(tmp_path / "a", "x"), finished(tmp_path / "b", "x", seed=2, over=None)]
    (found,) = group([r for run in runs for r in read(run)])
    assert dict(tables.rows([found]))["over inference"] == ["absent"]
    report.write([found], tmp_path / "r", "T")


def test_the_json_of_a_report_is_as_good_as_the_runs(tmp_path: Path) -> None:
    found = group(read(finished(tmp_path / "a", "x")))
    report.write(found, tmp_path / "r", "T")
    again = group(read(tmp_path / "r" / "comparison.json"))
    assert again == found
    assert report.page(again, "T") == report.page(found, "T")


def test_the_inventorys_labels_are_beside_their_nodes(tmp_path: Path) -> None:
    path = finished(tmp_path / "a", "x")
    plain = group(read(path))
    assert "labels" not in plain[0].results[0].nodes[0]
    (path / "labels.json").write_text('{"pi": {"board": "<pi> 4"}, "gone": {"room": "12"}}')
    found = group(read(path))
    assert found[0].results[0].nodes[0]["labels"] == {"board": "<pi> 4"}
    page = report.page(found, "T")
    assert "<th>board (label)</th>" in page
    assert "<td>&lt;pi&gt; 4</td>" in page
    assert "label)" not in report.page(plain, "T")
    report.write(found, tmp_path / "r", "T")
    assert group(read(tmp_path / "r" / "comparison.json")) == found


def test_what_is_no_better_than_the_untrained_model_is_not_on_the_front(tmp_path: Path) -> None:
    small = {key: value // 10 for key, value in SENT.items()}
    worse = one(finished(tmp_path / "a", "worse", after=0.6, sent=small))
    found = [worse, one(finished(tmp_path / "b", "good", after=0.9))]
    assert 0 not in fronts(found, AXES[3])  # of memory only the end counts
    assert dict(tables.rows([worse]))["best for its"] == ["bytes, seconds"]  # after round 1


def test_joules_are_summed_over_phases_and_follow_the_rounds(tmp_path: Path) -> None:
    path = finished(tmp_path / "a", "x")
    costs = [json.loads(line) for line in (path / "costs.jsonl").read_text().splitlines()]
    for cost in costs:
        cost["train"]["joules"] = 5.0
        cost["encode"] = {"seconds": 0.1, "rss": None, "joules": 0.5}
        cost["vitals"] = {"celsius": 80.5 + cost["round"], "throttled": "too <hot>"}
    (path / "costs.jsonl").write_text("".join(json.dumps(c) + "\n" for c in costs))
    (result,) = read(path)
    assert result.joules == 11.0
    assert [p["joules"] for p in result.points] == [0.0, 5.5, 11.0]
    (g,) = group([result])
    assert [axis.key for axis in axes([g])] == ["bytes", "seconds", "joules", "memory"]
    assert dict(tables.rows([g]))["joules"] == ["11"]
    assert (result.nodes[0]["celsius"], result.nodes[0]["throttled"]) == (82.5, "too <hot>")
    assert "pi (x, seed 1): too &lt;hot&gt;" in report.page([g], "T")
    cost["encode"]["joules"] = None  # not metered all the time
    (path / "costs.jsonl").write_text("".join(json.dumps(c) + "\n" for c in costs))
    assert read(path)[0].joules is None


# --- the Pareto front ------------------------------------------------------------


def test_the_front_by_hand() -> None:
    points = [(1.0, 0.5), (2.0, 0.4), (2.0, 0.7), (3.0, 0.7), (0.5, 0.1), (1.0, 0.5)]
    assert sorted(front(points)) == [0, 2, 4, 5]
    assert front([]) == []


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6))))
def test_the_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    def is_beaten(a: tuple[int, int]) -> bool:
        return any(c <= a[0] and q >= a[1] and (c, q) != a for c, q in points)

    kept = front(points)
    assert sorted(kept) == [i for i, p in enumerate(points) if not is_beaten(p)]
    assert [points[i][0] for i in kept] == sorted(points[i][0] for i in kept)


def test_a_run_is_best_where_one_of_its_evaluated_points_is(tmp_path: Path) -> None:
    small = {key: value // 10 for key, value in SENT.items()}
    found = [
        one(finished(tmp_path / "a", "cheap", after=0.65, sent=small)),
        one(finished(tmp_path / "b", "good", after=0.9)),
        one(finished(tmp_path / "c", "bad", after=0.6)),
    ]
    by_bytes = fronts(found, AXES[0])
    assert by_bytes[0] == [(3350.0, 0.7)]  # after round 1; its end is worse and dearer
    assert by_bytes[1] == [(67_000.0, 0.9)]
    assert 2 not in by_bytes
    best = dict(tables.rows(found))["best for its"]
    assert best == ["bytes, seconds", "bytes, seconds, memory", "seconds"]
    assert message_bytes(found[1].results[0]) == 67_000


# --- files -----------------------------------------------------------------------


def test_the_command_writes_a_page_that_loads_nothing_and_escapes_names(tmp_path: Path) -> None:
    run = finished(tmp_path / "a", "one")
    out = tmp_path / "r"
    arguments = ["report", str(run), "--out", str(out), "--title", "T&T", "--tensorboard"]
    done = CliRunner().invoke(seedwire.app, arguments)
    assert done.exit_code == 0, done.output
    page = (out / "comparison.html").read_text()
    assert "<title>T&amp;T</title>" in page
    assert "&lt;b&gt;d&lt;/b&gt;" in page
    assert "&lt;i&gt;h&lt;/i&gt;" in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert not re.search(r"url\((?!#)", page)
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert [s["run"] for s in json.loads((out / "comparison.json").read_text())] == ["one"]
    for form in ("json", "markdown"):
        said = CliRunner().invoke(seedwire.app, [*arguments[:4], "--format", form]).stdout
        if form == "json":
            assert json.loads(said) == tables.records(group(read(run)))
        else:
            assert said == (out / "comparison.md").read_text()


def test_bytes_by_kind_have_their_levels_and_the_kernels_own_count(tmp_path: Path) -> None:
    path = finished(tmp_path / "a", "x", sent=SENT | {"tcp_up": 43_001, "tcp_down": 24_002})
    counts = {"payload": {"update": {"up": 1}}, "message": {"update": {"up": 43_000}}}
    live = {"nodes": [{"node": "pi", "role": "train", "bytes": counts}]}
    (path / "status.json").write_text(json.dumps(live))
    page = report.page(group(read(path)), "T")
    cells = re.findall(r"<tr><td>(update|step|all[^<]*)</td><td>(.*?)</td></tr>", page)
    assert {kind: row.split("</td><td>") for kind, row in cells} == {
        "step": ["0 B", "0 B", "0 B", "24 kB"],
        "update": ["1 B", "0 B", "43 kB", "0 B"],
        "all": ["1 B", "2 B", "43 kB", "24 kB"],
        "all, as the kernel counts": ["absent", "absent", "43 kB", "24 kB"],
    }
    assert dict(tables.rows(group(read(path))))["TCP in all"] == ["67 kB"]


def test_tensorboard_reads_what_was_written_and_torch_is_not_loaded(tmp_path: Path) -> None:
    results = read(finished(tmp_path / "a", "x"))
    for _ in range(2):  # the second report replaces the first
        board.write(results, tmp_path / "t")
    events = EventAccumulator(str(tmp_path / "t" / "x-1"))
    events.Reload()
    scalars = [(e.step, round(e.value, 3), e.wall_time) for e in events.Scalars("test/accuracy")]
    assert scalars == [(0, 0.635, 0.0), (1, 0.7, 80.0), (2, 0.775, 160.0)]
    assert [e.value for e in events.Scalars("cost/message_bytes")] == [33500, 33500, 67000]
    code = "import sys, coordinator.board, coordinator.report; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_path_that_is_no_finished_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[{}]")
    for path in (tmp_path, tmp_path / "gone", tmp_path / "x.json"):
        with pytest.raises(ExperimentError, match="is not a finished run"):
            read(path)


@pytest.mark.net
@pytest.mark.slow
@pytest.mark.skipif(browser.FOUND is None, reason=f"none of {browser.NAMES} is installed")
def test_a_browser_opens_the_page_without_a_complaint(tmp_path: Path) -> None:
    names = ("one", "two")
    found = group([r for n in names for r in read(finished(tmp_path / n, n))])
    path = tmp_path / "page.html"
    path.write_text(report.page(found, "T"))
    page = browser.open_page(path.as_uri(), tmp_path / "profile")
    assert page.complaints == []
    assert page.dom.count("<figure") == 5


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1_234_567, "1.23 MB"),
        (999_499_000, "999 MB"),
        (999_600_000, "1 GB"),
        (2e9, "2 GB"),
        (3e12, "3 TB"),
    ],
)
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


def test_tcp_is_known_only_if_it_is_of_every_node() -> None:
    tcp = {"bytes": {"tcp": {"up": 10, "down": 20}}}
    assert Result({}, [], nodes=[tcp, tcp]).tcp_bytes == 60
    assert Result({}, [], nodes=[tcp, {"bytes": {}}]).tcp_bytes is None
    assert Result({}, []).tcp_bytes is None
    assert Result({"bytes": {"tcp_up": 1, "tcp_down": 2}}, []).tcp_bytes == 3
