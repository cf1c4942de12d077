"""The committed experiments: each could run, each table is what the report makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from coordinator import saving, tables
from coordinator.groups import group
from coordinator.results import read
from deploy import demo
from fedalgos import registry
from protocol import experiment as experiments
from scripts.experiments import BEGIN, END, PAPER, SAVING, WITHIN, merged

FOLDER = Path(__file__).parent.parent / "experiments"
FILES = sorted(FOLDER.glob("*/*.toml"))
WITH_TABLE = sorted(p.parent for p in FOLDER.glob("*/README.md") if BEGIN in p.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_file_is_a_run_that_could_start(path: Path) -> None:
    registry.settings(experiments.load(path, ()).method)


@pytest.mark.parametrize("folder", WITH_TABLE, ids=lambda folder: folder.name)
def test_every_table_is_what_the_report_makes_of_the_results_beside_it(folder: Path) -> None:
    results = read(folder / "results.json")
    written = (folder / "README.md").read_text().partition(BEGIN)[2].partition(END)[0]
    assert written.strip() == tables.markdown(group(results)).strip()
    names = {experiments.load(p, ()).run.name for p in folder.glob("*.toml") if p.name != PAPER}
    assert {result.summary["run"] for result in results} <= names


@pytest.mark.parametrize("folder", WITH_TABLE, ids=lambda folder: folder.name)
def test_every_saving_is_what_the_command_makes_of_the_results_beside_it(folder: Path) -> None:
    groups = group(read(folder / "results.json"))
    for place in SAVING.finditer((folder / "README.md").read_text()):
        head, *rows = saving.rows(saving.savings(groups, place[2], WITHIN))
        made = tables.as_markdown([head, ["---"] * len(head), *rows])
        assert place[0].partition("\n")[2].rpartition("<!--")[0].strip() == made.strip()


def test_the_demo_of_all_has_a_file_for_every_method() -> None:
    todo = demo.files(quick=False, every=True)
    methods = {o.__struct_config__.tag for o in get_args(registry.AnySettings)}
    assert {path.stem for path in todo} == methods
    assert {path.parent.name for path in todo} == {"demo"}
    for path in todo:
        e = experiments.load(path, ())
        assert (e.run.name, e.method["name"]) == (path.stem, path.stem)
        assert (e.data.test, e.partition.clients, e.run.seed) == (200, 8, 1)  # one task for all


def test_the_quick_demo_is_shorter_with_every_method() -> None:
    whole, quick = (demo.files(q, every=True) for q in (False, True))
    assert [path.stem for path in whole] == [path.stem for path in quick]
    for slow, (path, overrides) in zip(whole, quick.items(), strict=True):
        a, b = experiments.load(slow, ()), experiments.load(path, overrides)
        assert (b.rounds.count, b.data.test) < (a.rounds.count, a.data.test)
        assert b.method["name"] == a.method["name"]
    assert [*demo.files(True, False)] == [*quick][: len(demo.FOUR)]


def test_a_new_run_takes_the_place_of_the_one_with_its_name_and_seed() -> None:
    old = [{"run": "b", "seed": 1, "x": 0}, {"run": "a", "seed": 2, "x": 0}]
    new = [{"run": "b", "seed": 1, "x": 1}, {"run": "a", "seed": 1, "x": 1}]
    assert [(e["run"], e["seed"], e["x"]) for e in merged(old, new)] == [
        ("a", 1, 1),
        ("a", 2, 0),
        ("b", 1, 1),
    ]
