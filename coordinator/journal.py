"""What a run must not forget: a log and records, in transactions that are durable or never were.

    journal.sqlite   SQLite in WAL mode, synchronous: a commit is on the disk when it returns
    arrays/N         arrays over 1 MiB, on the disk before the commit that names them
    lock             held by the one process that may write

It knows nothing of rounds or methods; what is in a record, whoever keeps it knows.
SQLite has no checksum on a page, so every row and array carries one.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from protocol.errors import JournalError

Buffer = bytes | memoryview

FILE = "journal.sqlite"
SCHEMA_VERSION = 1
INLINE_BYTES = 1 << 20  # a larger array is a file: SQLite's blobs end at 1 GB
SCHEMA = f"""
CREATE TABLE log (
    id INTEGER PRIMARY KEY, kind TEXT NOT NULL, text TEXT NOT NULL, crc INTEGER NOT NULL
);
CREATE TABLE records (
    id INTEGER PRIMARY KEY, kind TEXT NOT NULL, name TEXT NOT NULL,
    plain BLOB NOT NULL, crc INTEGER NOT NULL, UNIQUE (kind, name)
);
CREATE TABLE arrays (  -- without data it is the file of its id
    id INTEGER PRIMARY KEY,
    record INTEGER NOT NULL REFERENCES records ON DELETE CASCADE,
    nbytes INTEGER NOT NULL, crc INTEGER NOT NULL, data BLOB
);
CREATE INDEX of_record ON arrays (record);
PRAGMA user_version = {SCHEMA_VERSION};
"""


@dataclass(frozen=True)
class Record:
    """What is kept under a kind and a name."""

    plain: bytes
    buffers: tuple[bytes, ...] = ()


class Journal:
    """The journal of one run directory, to which nobody else writes meanwhile.

    Args:
        directory: the run's.
        is_new: make the journal, instead of going on with one.

    Raises:
        JournalError: here and in every method: the disk is full or not to be written, the
            journal is damaged or of another version, or another process has it.  What was
            committed stays as it was.
    """

    def __init__(self, directory: Path, is_new: bool = False) -> None:
        self._directory, self._path = directory, directory / FILE
        self._arrays = directory / "arrays"
        self._unsynced: list[Path] = []  # named by no commit yet
        self._doomed: list[Path] = []  # named by the last commit, and not by the next
        self._files: dict[tuple[str, str], list[Path]] = {}  # of the records that have some
        self._ids = {table: itertools.count(1) for table in ("log", "records", "arrays")}
        if not is_new and not self._path.exists():
            raise JournalError(f"{directory} holds no run to resume: it has no journal.sqlite")
        self._lock = _locked(directory)
        try:
            with self._explained():
                self._db = sqlite3.connect(
                    self._path, isolation_level=None, check_same_thread=False
                )
                self._open(is_new)
        except BaseException:
            self._lock.close()
            raise

    def _open(self, is_new: bool) -> None:
        if not is_new:
            self._examine()
        for pragma in ("foreign_keys = ON", "journal_mode = WAL", "synchronous = FULL"):
            self._db.execute(f"PRAGMA {pragma}")
        if is_new:
            self._arrays.mkdir()
            self._db.executescript(f"BEGIN; {SCHEMA} COMMIT;")
            _sync(self._directory)
        sql = "SELECT kind, name, arrays.id FROM arrays JOIN records ON record = records.id "
        for kind, name, array in self._db.execute(sql + "WHERE data IS NULL"):
            self._files.setdefault((kind, name), []).append(self._arrays / str(array))
        named = set(itertools.chain.from_iterable(self._files.values()))
        for path in self._arrays.iterdir():
            if path not in named:
                path.unlink()  # written for a commit that never was
        for table in self._ids:  # no id is used twice while a file may still have it
            (last,) = self._db.execute(f"SELECT max(id) FROM {table}").fetchone()  # noqa: S608
            self._ids[table] = itertools.count((last or 0) + 1)

    def _examine(self) -> None:
        """Refuse what is damaged, before anything in it can change."""
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version != SCHEMA_VERSION:
            raise sqlite3.DatabaseError(f"of version {version}, this software has {SCHEMA_VERSION}")
        (found,) = self._db.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(f"damaged: {found.splitlines()[-1]}")
        for table in ("log", "records"):
            for *fields, crc in self._db.execute(f"SELECT * FROM {table}"):  # noqa: S608
                _check(crc == _sum(*fields), f"row {fields[0]} of {table}")

    # --- writing: nothing of it is there before ``commit`` -------------------------

    def log(self, kind: str, text: str) -> None:
        """Append to the log of this kind."""
        number = next(self._ids["log"])
        row = (number, kind, text, _sum(number, kind, text))
        self._write("INSERT INTO log VALUES (?, ?, ?, ?)", row)

    def keep(self, kind: str, name: str, plain: bytes, buffers: Sequence[Buffer] = ()) -> None:
        """Set the record, in place of an earlier one of the same kind and name."""
        self._doomed += self._files.pop((kind, name), [])
        number = next(self._ids["records"])
        row = (number, kind, name, plain, _sum(number, kind, name, plain))
        self._write("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?)", row)
        for buffer in buffers:
            is_inline = len(buffer) <= INLINE_BYTES
            array = next(self._ids["arrays"])
            data = buffer if is_inline else None
            entry = (array, number, len(buffer), _sum(array, number, buffer), data)
            self._write("INSERT INTO arrays VALUES (?, ?, ?, ?, ?)", entry)
            if not is_inline:
                path = self._arrays / str(array)
                self._unsynced.append(path)
                self._files.setdefault((kind, name), []).append(path)
                with self._explained():
                    path.write_bytes(buffer)

    def drop(self, kind: str, name: str) -> None:
        """Forget the record, if there is one."""
        self._doomed += self._files.pop((kind, name), [])
        self._write("DELETE FROM records WHERE kind = ? AND name = ?", (kind, name))

    @property
    def is_dirty(self) -> bool:
        """Whether anything was written since the last commit."""
        return self._db.in_transaction

    def commit(self) -> None:
        """All that was written since the last commit is there for good, or none of it."""
        if not self._db.in_transaction:
            return
        with self._explained():
            new = [path for path in self._unsynced if path not in self._doomed]
            for path in new:
                _sync(path)
            if new:
                _sync(self._arrays)
            self._db.execute("COMMIT")
            self._unsynced = []
            for path in self._doomed:
                path.unlink(missing_ok=True)
            self._doomed = []

    # --- reading -------------------------------------------------------------------

    def logged(self, kind: str) -> Iterator[str]:
        """The log of this kind, from its beginning."""
        with self._explained():
            sql = "SELECT text FROM log WHERE kind = ? ORDER BY id"
            for (text,) in self._db.execute(sql, (kind,)):
                yield text

    def names(self, kind: str) -> list[str]:
        """Of the records of this kind, in the order in which they were last set."""
        with self._explained():
            sql = "SELECT name FROM records WHERE kind = ? ORDER BY id"
            return [name for (name,) in self._db.execute(sql, (kind,))]

    def record(self, kind: str, name: str) -> Record | None:
        """What was last kept there, or None."""
        with self._explained():
            sql = "SELECT id, plain FROM records WHERE kind = ? AND name = ?"
            row = self._db.execute(sql, (kind, name)).fetchone()
            if row is None:
                return None
            record, plain = row
            sql = "SELECT id, nbytes, crc, data FROM arrays WHERE record = ? ORDER BY id"
            buffers = []
            for array, nbytes, crc, data in self._db.execute(sql, (record,)):
                path = self._arrays / str(array)
                _check(data is not None or path.exists(), f"{path}, which is gone,")
                whole = path.read_bytes() if data is None else data
                is_sound = (nbytes, crc) == (len(whole), _sum(array, record, whole))
                _check(is_sound, f"array {array} of {kind} {name}")
                buffers.append(whole)
            return Record(plain, tuple(buffers))

    def close(self) -> None:
        """Let go of it; what was not committed is gone."""
        self._db.close()
        self._lock.close()

    def _write(self, sql: str, row: tuple[object, ...]) -> None:
        with self._explained():
            if not self._db.in_transaction:
                self._db.execute("BEGIN IMMEDIATE")
            self._db.execute(sql, row)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """One clear line for whatever goes wrong below."""
        try:
            yield
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:  # the last of damaged names
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            is_disk = isinstance(error, sqlite3.OperationalError | OSError)
            mend = f"make room or mend it, then seedwire coordinator --resume {self._directory}"
            hint = f"what was committed is safe: {mend}" if is_disk else "restore it from a copy"
            raise JournalError(f"{self._path}: {why}; {hint}") from error


def _locked(directory: Path) -> IO[bytes]:
    """The lock, held until it is closed or this process ends, however it does."""
    try:
        lock = (directory / "lock").open("ab")
    except OSError as error:
        raise JournalError(f"cannot write to {directory}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise JournalError(f"another coordinator is running {directory}") from error
    return lock


def _sync(path: Path) -> None:
    """Have a file, or the names in a directory, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sum(*fields: int | str | Buffer) -> int:
    """A checksum of a row's fields, what it is called among them."""
    crc = 0
    for field in fields:
        crc = zlib.crc32(field if isinstance(field, Buffer) else f"{field};".encode(), crc)
    return crc


def _check(is_sound: bool, what: str) -> None:
    if not is_sound:
        raise sqlite3.DatabaseError(f"damaged: the checksum of {what} is wrong")
