"""Random bytes against the decoders of payloads, for as long as one likes.

    python -m tests.fuzz_payload --seconds 30

Whatever comes in, ``decode`` gives a value that is encoded to the same spec and the same bytes
again, or raises ``RemoteProtocolError``: never anything else, and never with more memory than
belongs to the bytes that are there.  What it tries are encodings of random payloads, whole or
damaged, and their specs, true or not.  Every case follows from ``--seed`` and its number.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import time
import tracemalloc
from collections import Counter
from typing import Any, get_args

import msgspec
import numpy as np

from protocol import places, values
from protocol.payload import (
    Blocks,
    Dense,
    Payload,
    Run,
    Scalars,
    Sparse,
    SparseSpec,
    Spec,
    decode,
    encode,
    spec_of,
)
from protocol.values import Coding
from protocol.wire import RemoteProtocolError

CODINGS: tuple[Coding, ...] = get_args(Coding)
BESIDE = 100_000  # bytes that a call may take whatever its buffer, for errors, casts and the like
FACTOR = 300  # memory over buffer: as signs eight entries a byte, each some int64 and a float
LARGEST = 1 << 40  # size that a spec may name
SMALL = 40_000  # size whose bitmap is cheap
SIZES = [0, 1, 2, 8, 100, 1000, SMALL, 1 << 32, LARGEST]  # of sparse vectors

Rng = np.random.Generator


def check(spec: Spec, buffer: bytes) -> str:
    """Assert the law of one buffer; returns what was decoded, or why nothing was."""
    tracemalloc.start()
    try:
        value = decode(spec, buffer)
    except RemoteProtocolError as error:
        return "refused: " + re.sub(r"[0-9]+|'.*'", "#", str(error))
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < BESIDE + FACTOR * len(buffer), f"{peak} bytes of memory"
    assert value.values.dtype == np.float32
    assert np.isfinite(value.values).all()
    assert spec_of(value) == spec
    assert bytes(encode(value)) == buffer
    return type(value).__name__


def made(rng: Rng) -> Payload:
    """A payload of any kind."""
    count = int(rng.choice([0, 1, 2, 7, 40, 255, 257, 600]))
    x = (rng.standard_normal(count) * 2.0 ** rng.integers(-150, 120)).astype(np.float32)
    x[rng.random(count) < rng.choice([0, 0.3, 1])] = 0
    match rng.integers(6):
        case 0:
            return Dense(x, tuple(range(rng.integers(3))))
        case 1:
            return Scalars((Run(1, count // 2), Run(2, count - count // 2)), x)
        case 2:
            cuts = np.sort(rng.integers(0, count + 1, rng.integers(5)))
            counts = np.diff(cuts, prepend=0, append=count)
            return Blocks.of(counts, x, "f16" if rng.random() < 0.7 else "f32")
        case _:
            where, size = mask(rng, count)
            coding = CODINGS[rng.integers(len(CODINGS))]
            return Sparse.of(size, where, x[: len(where)], coding, int(rng.integers(1 << 40)))


def mask(rng: Rng, count: int) -> tuple[Any, int]:
    """At most ``count`` places, alone or together, and what they are below."""
    size = max(int(rng.choice(SIZES)), count)
    width = int(rng.choice([1, 1, 3, 50]))
    starts = rng.integers(0, size, -(-count // width)) if size else np.zeros(0, np.int64)
    where = np.unique(starts[:, None] + np.arange(width)).ravel()[:count]
    where = where[where < size].astype(np.int64)
    if rng.random() < 0.2:
        size = len(where) if rng.random() < 0.5 else size
        where = np.arange(len(where))
    return where, size


def damaged(rng: Rng, buffer: bytes) -> bytes:
    """The buffer after a few changes: bits, bytes, pieces taken out, doubled or put in."""
    data = bytearray(buffer)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(data) + 1))
        end = at + int(rng.integers(1, 9))
        match rng.integers(6):
            case 0 if data:
                data[at % len(data)] ^= 1 << int(rng.integers(8))
            case 1 if data:
                data[at % len(data)] = int(rng.choice([0, 1, 2, 3, 4, 0x7F, 0x80, 0xFF]))
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = data[at:end]
            case 4:
                data[at:at] = rng.bytes(end - at)
            case _:
                data[at:end] = rng.bytes(len(data[at:end]))
    return bytes(data)


def lying(rng: Rng, spec: Spec, nbytes: int) -> Spec:
    """The spec with a field changed, sometimes so that the size is the declared one again."""
    fields = msgspec.to_builtins(spec)
    names = [name for name, value in fields.items() if type(value) is int]
    if names:
        name = str(rng.choice(names))
        near = int(fields[name]) + int(rng.integers(-2, 3))
        fields[name] = bounded(int(rng.choice([near, near, 0, 1 << 20, LARGEST])))
    if rng.random() < 0.3 and fields["kind"] in ("sparse", "blocks"):
        of = CODINGS if fields["kind"] == "sparse" else CODINGS[:2]
        fields["coding"] = of[rng.integers(len(of))]
    lie: Spec = msgspec.convert(fields, Spec)
    if fields["kind"] == "sparse" and rng.random() < 0.7:
        fields["place_nbytes"] = bounded(fields["place_nbytes"] + nbytes - lie.nbytes)
        lie = msgspec.convert(fields, Spec)
    return lie


def recoded(rng: Rng, payload: Sparse) -> tuple[Spec, bytes]:
    """The same, but its places in one coding or another, the shortest or not."""
    among = [places.CODINGS[rng.integers(1, len(places.CODINGS))]]
    where = places.encode(payload.size, payload.places, among)
    x = values.encode(payload.coding, payload.values, 0)
    return SparseSpec(payload.size, len(payload.places), len(where), payload.coding), x + where


def bounded(size: int) -> int:
    return min(max(size, 0), LARGEST)


def case(seed: int, number: int) -> tuple[Spec, bytes]:
    """One spec and one buffer, that may fit each other or not."""
    rng = np.random.default_rng([seed, number])
    payload = made(rng)
    spec, buffer = spec_of(payload), bytes(encode(payload))
    if isinstance(payload, Sparse) and payload.size <= SMALL and rng.random() < 0.2:
        spec, buffer = recoded(rng, payload)
    if rng.random() < 0.7:
        buffer = damaged(rng, buffer)
        if rng.random() < 0.7:  # the size is right, so that the bytes themselves are looked at
            buffer = (buffer + rng.bytes(spec.nbytes))[: spec.nbytes]
    if rng.random() < 0.4:
        spec = lying(rng, spec, len(buffer))
    return spec, buffer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    o = parser.parse_args()
    seen: Counter[str] = Counter()
    end = time.monotonic() + o.seconds
    for number in itertools.count(o.first):
        if time.monotonic() > end:
            break
        spec, buffer = case(o.seed, number)
        try:
            seen[check(spec, buffer)] += 1
        except Exception:
            sys.stderr.write(f"seed {o.seed}, case {number}: {spec}\n{buffer.hex()}\n")
            raise
    for what, count in seen.most_common():
        sys.stdout.write(f"{count:9} {what}\n")


if __name__ == "__main__":
    main()
