"""The journal: what is committed is there, what is not never was, and damage is noticed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import journal as journals
from coordinator.journal import INLINE_BYTES, Journal, Record
from protocol.errors import JournalError
from tests.fakes import in_memory, mounted, run

BIG = bytes(range(256)) * (INLINE_BYTES // 256) + b"and one more"


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with closing(Journal(tmp_path, is_new=True)) as made:
        yield made


def crashed(directory: Path, to: Path) -> Path:
    """What another process would find if this one were killed now."""
    to.mkdir()
    for path in directory.iterdir():
        if path.is_dir():
            shutil.copytree(path, to / path.name)
        elif not path.name.endswith("-shm"):  # memory, not disk
            shutil.copy(path, to)
    return to


def everything(journal: Journal) -> tuple[list[str], dict[str, Record | None]]:
    records = {name: journal.record("r", name) for name in journal.names("r")}
    return list(journal.logged("l")), records


def test_what_is_committed_survives_and_what_is_not_never_was(
    journal: Journal, tmp_path: Path
) -> None:
    journal.log("l", "one")
    journal.keep("r", "a", b"plain", [b"small", BIG])
    dirty = [journal.is_dirty]
    journal.commit()
    assert [*dirty, journal.is_dirty] == [True, False]
    journal.log("l", "two")
    journal.keep("r", "a", b"other", [BIG[::-1]])
    journal.keep("r", "b", b"new")
    assert len(list((tmp_path / "arrays").iterdir())) == 2
    with closing(Journal(crashed(tmp_path, tmp_path / "after"))) as after:
        assert everything(after) == (["one"], {"a": Record(b"plain", (b"small", BIG))})
        assert len(list((tmp_path / "after" / "arrays").iterdir())) == 1
    journal.commit()
    with closing(Journal(crashed(tmp_path, tmp_path / "later"))) as later:
        assert everything(later) == (["one", "two"], everything(journal)[1])
        assert later.record("r", "a") == Record(b"other", (BIG[::-1],))


def test_a_large_array_is_a_file_until_its_record_is_replaced_or_dropped(
    journal: Journal, tmp_path: Path
) -> None:
    def num_files() -> int:
        return len(list((tmp_path / "arrays").iterdir()))

    for name in ("a", "b"):
        journal.keep("r", name, b"", [BIG, BIG[:INLINE_BYTES]])
    journal.commit()
    assert num_files() == 2
    journal.keep("r", "a", b"", [BIG])
    assert num_files() == 3  # the old one is what a crash would go back to
    journal.commit()
    assert num_files() == 2
    journal.drop("r", "a")
    journal.drop("r", "b")
    journal.drop("r", "c")
    assert num_files() == 2
    journal.commit()
    assert num_files() == 0
    assert everything(journal) == ([], {})


def test_nothing_is_left_of_what_was_replaced_or_dropped_also_after_a_restart(
    journal: Journal, tmp_path: Path
) -> None:
    for _ in range(3):
        journal.keep("r", "a", b"", [b"small", BIG])
        journal.keep("r", "b", b"", [BIG])
    journal.commit()
    with closing(Journal(crashed(tmp_path, tmp_path / "again"))) as again:
        again.keep("r", "a", b"", [b"small"])
        again.drop("r", "b")
        again.commit()
        assert everything(again) == ([], {"a": Record(b"", (b"small",))})
        assert not list((tmp_path / "again" / "arrays").iterdir())
        assert again._db.execute("SELECT count(*) FROM arrays").fetchone() == (1,)


def test_a_file_and_its_name_are_on_the_disk_before_the_commit_that_names_it(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    sync = journals._sync

    def noted(path: Path) -> None:
        order.append(path.name)
        sync(path)

    monkeypatch.setattr(journals, "_sync", noted)
    journal._db.set_trace_callback(lambda sql: order.append(sql.split()[0]))
    journal.keep("r", "a", b"", [BIG])
    journal.keep("r", "b", b"", [BIG])
    journal.drop("r", "b")  # nobody waits for a disk to take what is not wanted any more
    journal.commit()
    (only,) = (path.name for path in (tmp_path / "arrays").iterdir())
    assert order[-3:] == [only, "arrays", "COMMIT"]
    (level,) = journal._db.execute("PRAGMA synchronous").fetchone()
    assert level == 2


def test_a_second_coordinator_is_refused_and_one_after_the_end_is_not(
    journal: Journal, tmp_path: Path
) -> None:
    with pytest.raises(JournalError, match="another coordinator is running"):
        Journal(tmp_path)
    journal.close()
    Journal(tmp_path).close()


def test_a_directory_without_a_journal_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"no journal\.sqlite"):
        Journal(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_journal_of_another_version_is_refused(journal: Journal, tmp_path: Path) -> None:
    journal._db.execute("PRAGMA user_version = 7")
    journal.close()
    with pytest.raises(JournalError, match="of version 7, this software has 1"):
        Journal(tmp_path)


# --- damage ----------------------------------------------------------------------


def filled(directory: Path) -> None:
    with closing(Journal(directory, is_new=True)) as journal:
        for i in range(40):
            journal.log("l", f"line {i} " + "x" * 100)
            journal.keep("r", f"name {i}", b"plain %d " % i * 20, [bytes([i]) * 500])
        journal.keep("r", "large", b"", [bytes(20000)])
        journal.commit()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a filled journal, never to be touched."""
    directory = tmp_path_factory.mktemp("sound")
    filled(directory)
    return directory


@settings(max_examples=80)
@given(data=st.data())
def test_flipped_bytes_anywhere_are_noticed_or_touch_nothing(
    sound: Path, data: st.DataObject
) -> None:
    with in_memory() as name:
        directory = crashed(sound, Path(name, "run"))
        with closing(Journal(directory)) as journal:
            expected = everything(journal)
        path = directory / "journal.sqlite"
        whole = bytearray(path.read_bytes())
        start = data.draw(st.integers(0, len(whole) - 1))
        for i in range(start, min(len(whole), start + data.draw(st.integers(1, 64)))):
            whole[i] ^= 0xFF
        path.write_bytes(whole)
        found: object = None
        try:
            with closing(Journal(directory)) as damaged:
                found = everything(damaged)
        except JournalError as error:
            found = str(error)
        if isinstance(found, str):
            assert "\n" not in found
            assert path.read_bytes() == whole  # nothing is mended behind anybody's back
        else:
            assert found == expected


@pytest.mark.parametrize("how", ["shorter", "another", "gone"])
def test_a_damaged_file_is_noticed(journal: Journal, tmp_path: Path, how: str) -> None:
    journal.keep("r", "a", b"", [BIG])
    journal.commit()
    (path,) = (tmp_path / "arrays").iterdir()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(BIG[:-1] if how == "shorter" else BIG[:-1] + b"!")
    with pytest.raises(
        JournalError, match=r"checksum of array 1 of r a|1, which is gone,.*from a copy"
    ):
        journal.record("r", "a")


# --- a disk that takes nothing -----------------------------------------------------


@pytest.mark.parametrize("nbytes", [1000, 200_000, INLINE_BYTES + 1])
def test_a_full_disk_is_one_line_and_the_last_commit_is_there(tmp_path: Path, nbytes: int) -> None:
    with mounted(tmp_path / "full", 8 << 20) as directory:
        full = pytest.raises(JournalError, match=r"disk is full|No space left")
        with closing(Journal(directory, is_new=True)) as journal, full as raised:
            filling(journal, nbytes)
        assert "\n" not in str(raised.value)
        with closing(Journal(crashed(directory, tmp_path / "after"))) as again:
            before = everything(again)
            lines, records = before
            assert len(lines) > 1
            assert lines == list(records) == [str(i) for i in range(len(lines))]
        run("mount", "-o", f"remount,size={16 << 20}", directory)  # room is made
        with closing(Journal(directory)) as again:
            assert everything(again) == before
            again.keep("r", "more", b"")
            again.commit()


def filling(journal: Journal, nbytes: int) -> None:
    for i in range(20_000):
        journal.keep("r", str(i), b"", [bytes([i % 256]) * nbytes])
        journal.log("l", str(i))
        journal.commit()


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with mounted(tmp_path / "fixed", 4 << 20) as directory:
        filled(directory)
        run("mount", "-o", "remount,ro", directory)
        with pytest.raises(JournalError, match=r"cannot write to .*: Read-only file system"):
            Journal(directory)


# --- any order ---------------------------------------------------------------------

NAMES, SIZES = st.sampled_from("ab"), st.sampled_from([0, 1, 5000, INLINE_BYTES + 1])
OPS = st.one_of(
    st.tuples(st.just("log"), st.text(max_size=5)),
    st.tuples(st.just("keep"), NAMES, st.lists(SIZES, max_size=2)),
    st.tuples(st.just("drop"), NAMES),
    st.just(("commit",)),
)


@settings(max_examples=20)
@given(ops=st.lists(OPS, max_size=12))
def test_after_a_crash_the_journal_is_as_at_the_last_commit(ops: list[tuple[object, ...]]) -> None:
    with in_memory() as name:
        directory = Path(name, "run")
        directory.mkdir()
        lines: list[str] = []
        records: dict[str, Record] = {}
        last: tuple[list[str], dict[str, Record]] = ([], {})
        with closing(Journal(directory, is_new=True)) as journal:
            for number, op in enumerate(ops):
                match op:
                    case ("log", str(text)):
                        journal.log("l", text)
                        lines.append(text)
                    case ("keep", str(key), list(sizes)):
                        buffers = tuple(bytes([number]) * size for size in sizes)
                        journal.keep("r", key, b"%d" % number, buffers)
                        records[key] = Record(b"%d" % number, buffers)
                    case ("drop", str(key)):
                        journal.drop("r", key)
                        records.pop(key, None)
                    case _:
                        journal.commit()
                        last = (lines.copy(), records.copy())
            crashed(directory, Path(name, "after"))
        with closing(Journal(Path(name, "after"))) as after:
            assert everything(after) == last
