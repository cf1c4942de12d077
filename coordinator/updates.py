"""Updates that wait to be aggregated: in the journal; all but scalars one at a time in memory."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

from msgspec import msgpack

from coordinator.journal import Journal
from fedalgos.method import Assignment, Contribution
from protocol import payload

SMALL_BYTES = 1 << 12  # of scalars, which take no more decoded
_KIND = "update"
_Plain = tuple[Assignment, int, float, payload.Spec]


class Updates(MutableMapping[str, Contribution]):
    """Contributions by ref; all but few scalars are decoded anew each time they are read."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._held: dict[str, Contribution | None] = dict.fromkeys(journal.names(_KIND))

    def __setitem__(self, ref: str, c: Contribution) -> None:
        spec = payload.spec_of(c.payload)
        plain = msgpack.encode((c.assignment, c.examples, c.loss, spec))
        self._journal.keep(_KIND, ref, plain, [payload.encode(c.payload)])
        is_small = isinstance(c.payload, payload.Scalars) and spec.nbytes <= SMALL_BYTES
        self._held[ref] = c if is_small else None

    def __getitem__(self, ref: str) -> Contribution:
        if (held := self._held.get(ref)) is not None:
            return held
        record = self._journal.record(_KIND, ref)
        if record is None:
            raise KeyError(ref)
        assignment, examples, loss, spec = msgpack.decode(record.plain, type=_Plain)
        return Contribution(assignment, examples, payload.decode(spec, record.buffers[0]), loss)

    def __delitem__(self, ref: str) -> None:
        del self._held[ref]
        self._journal.drop(_KIND, ref)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._held))

    def __len__(self) -> int:
        return len(self._held)
