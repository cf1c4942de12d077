"""The reference pages name everything that the code has, so they cannot fall behind unseen."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgpack
import msgspec
import numpy as np
import pytest
from msgspec import NODEFAULT, Struct
from msgspec.structs import replace

from coordinator.archive import Archive
from coordinator.central import Central
from coordinator.journal import Journal
from coordinator.record import RunRecorder
from coordinator.summary import SUMMARY_VERSION
from deploy.errors import DeployError
from fedalgos.fedavg import FedAvg, fedavg
from fedalgos.method import Settings
from fedalgos.optim import Local, Server
from fedalgos.registry import AnySettings
from fedalgos.space import ParamSpace, digest
from node.packages import PACKAGES
from node.shapes import SHAPES
from protocol import experiment, messages, noise, places, values, wire
from protocol.blobs import (
    CHUNK_BYTES,
    FAST_BYTES_PER_SECOND,
    FAST_CHUNK_BYTES,
    INLINE_BYTES,
    WINDOW,
)
from protocol.channel import Channel, to_coordinator, to_node
from protocol.errors import SeedwireError
from protocol.experiment import Experiment
from protocol.keys import Token
from protocol.messages import (
    Beat,
    Carrier,
    Enroll,
    Enrolled,
    Hello,
    Message,
    Pull,
    Refuse,
    Score,
    Step,
    Task,
    ToCoordinator,
    ToNode,
    Update,
)
from protocol.meter import zmtp_bytes
from protocol.parts import Cost, Phase, Progress, TensorInfo
from protocol.payload import Blocks, Dense, Payload, Run, Scalars, Sparse, Spec, encode, spec_of
from protocol.process import INTERRUPTED

DOCS = Path(__file__).parent.parent / "docs"
MESSAGES: tuple[type[Message], ...] = (*get_args(ToCoordinator), *get_args(ToNode))
METHODS: tuple[type[Settings], ...] = get_args(AnySettings)
OPTIMISERS: tuple[type[Struct], ...] = tuple(
    dict.fromkeys((*get_args(Local), *get_args(Server)))  # in the same order in each process
)


def page(name: str) -> str:
    return (DOCS / name).read_text()


def section(name: str, heading: str) -> str:
    """What stands under a heading, down to the next one of any level."""
    found = re.search(
        rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", page(name), re.MULTILINE | re.DOTALL
    )
    assert found, f"docs/{name} has no section {heading!r}"
    return found[1]


def rows(text: str) -> dict[str, str]:
    """The rows of all tables, by what the first column has in backticks."""
    return dict(re.findall(r"^\| `([^`]+)`.*? \| (.*) \|$", text, re.MULTILINE))


def tag(kind: type[Struct]) -> str:
    return str(kind.__struct_config__.tag)


def defaults(kind: type[Struct]) -> dict[str, object]:
    return {f.name: f.default for f in msgspec.structs.fields(kind)}


# --- protocol.md -----------------------------------------------------------------


def test_the_protocol_page_is_of_the_version_that_the_code_speaks() -> None:
    text = page("protocol.md")
    assert text.startswith(f"# The wire protocol, version {wire.VERSION}\n")
    assert f"{wire.MAX_BODY_BYTES:,}" in text
    assert f"over {INLINE_BYTES:,} bytes" in text
    assert f"{CHUNK_BYTES:,} bytes at a time" in text
    assert f"at most {WINDOW} pulls open" in text
    assert f"for {FAST_CHUNK_BYTES:,} at a time" in text
    assert f"at {8 * FAST_BYTES_PER_SECOND / 1e6:.0f} Mbit/s" in text
    assert f"{wire.MAX_INLINE_BYTES:,}" in text
    assert str(wire.VERSION) in section("protocol.md", "14. Changes")


@pytest.mark.parametrize("kind", MESSAGES, ids=tag)
def test_every_field_of_every_message_is_in_the_tables_and_no_other(kind: type[Message]) -> None:
    described = rows(section("protocol.md", f"`{tag(kind)}`"))
    refusals = set(get_args(messages.RefuseCode)) if kind is Refuse else set()
    assert described.keys() - refusals == set(kind.__struct_fields__)
    assert refusals <= described.keys()
    required = {name for name, value in defaults(kind).items() if value is NODEFAULT}
    assert {name for name, cells in described.items() if "| required |" in cells} == required


@pytest.mark.parametrize("kind", [TensorInfo, Cost])
def test_every_field_of_the_nested_structures_is_described(kind: type[Struct]) -> None:
    text = section("protocol.md", "`ready`")
    assert not [name for name in kind.__struct_fields__ if f"`{name}`" not in text]


def test_every_phase_and_every_refusal_is_named() -> None:
    text = page("protocol.md")
    codes = get_args(messages.RefuseCode)
    assert not [word for word in (*get_args(Phase), *codes) if f"`{word}`" not in text]
    assert not [code for code in codes if code not in rows(section("errors.md", "2. Refusals"))]


@pytest.mark.parametrize("kind", get_args(Spec), ids=tag)
def test_every_field_of_every_payload_is_in_its_table(kind: type[Struct]) -> None:
    assert rows(section("protocol.md", f"`{tag(kind)}`")).keys() == set(kind.__struct_fields__)


def test_the_noise_page_has_the_name_of_the_stream() -> None:
    assert f"`{noise.STREAM}`" in page("noise.md")


VALUES = np.array([1.0, -2.0, 0.5], np.float32)
ROUNDING = noise.key("rounding", 1, 2, 3)
GOLDEN: dict[str, Message | Payload] = {
    "beat": Beat(busy="round 1, client 2", progress=Progress(round=1, client=2, done=1, total=9)),
    "hello": Hello(node="pi-1", software="0.1.0", stream=noise.STREAM, clients=(0, 1)),
    "enroll": Enroll(node="pi-1", key=bytes(range(32))),
    "enrolled": Enrolled(),
    "refuse": Refuse(code="login", reason="log in first"),
    "task": Task(round=7, attempt=0, client=3, version=6, units=(0, 2)),
    "pull": Pull(blob=1, offset=0, nbytes=524288),
    "scalars": Scalars((Run(3, 2, picks=(7, 2)), Run(5, 1, 0.5)), VALUES),
    "sparse, f32": Sparse(20, np.array([0, 9, 19]), VALUES),
    "sparse, int8": Sparse.of(1 << 20, np.array([0, 258, 299]), VALUES, "int8", ROUNDING),
    "blocks, f32": Blocks.of(np.array([2, 1]), VALUES, "f32"),
    "blocks, f16": Blocks.of(np.array([2, 1]), VALUES, "f16"),
    "dense": Dense(VALUES, (0, 2)),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_bytes_of_the_page_are_what_we_send(name: str) -> None:
    first, _, coding = name.partition(", ")
    start = f"| `{first}`, `{coding}`" if coding else f"| `{first}`"
    lines = section("protocol.md", "12. Golden bytes").splitlines()
    (line,) = [line for line in lines if line.startswith(start)]
    value = GOLDEN[name]
    if isinstance(value, Message):
        body = msgspec.to_builtins(value, builtin_types=(bytes,))
        want = [msgpack.packb(body)]
    else:
        want = [msgpack.packb(msgspec.to_builtins(spec_of(value))), bytes(encode(value))]
    assert re.findall(r"`((?:[0-9a-f]{2}){8,})`", line) == [data.hex() for data in want]


def test_the_golden_bytes_of_every_coding_are_what_we_write() -> None:
    text = section("protocol.md", "12. Golden bytes")
    of_values = {name: cell for name, cell in rows(text).items() if name in get_args(values.Coding)}
    assert of_values == {
        coding: f"`{values.encode(coding, VALUES, ROUNDING).hex()}`"
        for coding in get_args(values.Coding)
    }
    line = r"^\| `([a-z-]+)` \| (\d+) \| ([\d ]+|none) \| `([0-9a-f]+)` \|$"
    of_places = re.findall(line, text, re.MULTILINE)
    assert [name for name, *_ in of_places] == list(places.CODINGS)
    for name, n, listed, written in of_places:
        where = np.array([int(i) for i in listed.split() if i != "none"], np.int64)
        assert places.encode(int(n), where, [name]).hex() == written


def test_every_coding_is_described() -> None:
    described = rows(section("protocol.md", "Codings of values"))
    assert described.keys() == set(get_args(values.Coding))
    text = section("protocol.md", "Codings of places")
    for number, coding in enumerate(places.CODINGS):
        assert f"\n| {number} | {coding} |" in text
    for name in ("sparse", "blocks"):
        kind = next(spec for spec in get_args(Spec) if tag(spec) == name)
        (field,) = [f for f in msgspec.structs.fields(kind) if f.name == "coding"]
        cell = rows(section("protocol.md", f"`{name}`"))["coding"]
        assert set(re.findall(r"`(\w+)`", cell)) == set(get_args(field.type))


def test_the_token_of_the_page_is_ours() -> None:
    token = Token(bytes(range(32)).hex(), bytes(range(16)))
    text = section("protocol.md", "12. Golden bytes")
    assert f"`{token.text}`" in text
    assert f"`{token.identity.own.public}`" in text


def test_every_reason_to_turn_somebody_away_is_listed() -> None:
    source = "".join(
        (DOCS.parent / path).read_text()
        for path in ("coordinator/guard.py", "coordinator/door.py", "coordinator/enrolled.py")
    )
    reasons = re.findall(r'refuse\("([^"]+)"', source)
    reasons += re.findall(r'"((?:\w+) (?:key|token))"(?! if name)', source)
    router = (DOCS.parent / "protocol/router.py").read_text()
    why = router[router.index("def _why") :]
    reasons += re.findall(r'(?:return|else) "([^"]+)"', why)
    assert len(reasons) >= 11
    text = section("errors.md", "2. Refusals")
    assert not [reason for reason in reasons if f"`{reason}`" not in text]


def test_the_digests_of_the_page_are_ours() -> None:
    tensors = (TensorInfo("a.weight", (2, 3), "a"), TensorInfo("b.bias", (2,), "b"))
    text = section("protocol.md", "10. Digests")
    assert msgspec.json.encode(tensors).decode() in text
    assert f"`{ParamSpace.of(tensors).digest.hex()}`" in text
    assert f"`{digest(VALUES).hex()}`" in text


# --- experiments.md --------------------------------------------------------------


def sections() -> Iterator[tuple[str, type[Struct]]]:
    for f in msgspec.structs.fields(Experiment):
        if isinstance(f.type, type) and issubclass(f.type, Struct):
            yield f"[{f.name}]", f.type
    yield "[method]", Settings
    for kind in METHODS:
        yield tag(kind), kind


def written(value: object) -> str:
    """A default as it stands in the tables."""
    if value is NODEFAULT:
        return "required"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Struct):
        shown = {"kind": tag(type(value))} | {
            name: getattr(value, name)
            for name, default in defaults(type(value)).items()
            if getattr(value, name) != default
        }
        return "`{ " + ", ".join(f"{k} = {written(v).strip('`')}" for k, v in shown.items()) + " }`"
    if isinstance(value, tuple):
        return "[]"
    if isinstance(value, float):
        return np.format_float_positional(value, trim="0")
    return f"`{json.dumps(value)}`" if isinstance(value, str) else str(value)


@pytest.mark.parametrize(("heading", "kind"), list(sections()), ids=str)
def test_every_key_of_an_experiment_is_in_the_tables_with_its_default(
    heading: str, kind: type[Struct]
) -> None:
    shared = set(Settings.__struct_fields__) if kind in METHODS else set()
    want = {name: written(v) for name, v in defaults(kind).items() if name not in shared}
    if kind is Settings:
        want["name"] = "required"
    described = rows(section("experiments.md", heading))
    assert {key: cells.split(" | ")[0] for key, cells in described.items()} == want


def test_every_section_of_an_experiment_has_a_heading() -> None:
    for name in Experiment.__struct_fields__:
        section("experiments.md", f"[{name}]")


@pytest.mark.parametrize("kind", OPTIMISERS, ids=tag)
def test_every_constant_of_an_optimiser_is_listed(kind: type[Struct]) -> None:
    (line,) = [
        line
        for line in section("experiments.md", "Optimisers").splitlines()
        if line.startswith(f'| `"{tag(kind)}"`')
    ]
    assert set(re.findall(r"`(\w+)`", line)) == set(kind.__struct_fields__)


def test_every_source_and_shape_is_listed() -> None:
    text = page("experiments.md")
    assert not [name for name in PACKAGES if f"pypi:{name}" not in text]
    assert not [n for p in PACKAGES.values() for n in p.sets if f"/{n}`" not in text]
    assert not [name for name in SHAPES if f"`{name}`" not in text]


@pytest.mark.parametrize("kind", METHODS, ids=tag)
def test_every_method_has_a_section_that_names_its_settings(kind: type[Settings]) -> None:
    text = page("methods.md")
    (part,) = [p for p in text.split("\n## ") if f"(`{tag(kind)}`)\n" in p]
    own = [name for name in kind.__struct_fields__ if name not in Settings.__struct_fields__]
    assert not [name for name in own if f"`{name}`" not in part]
    (shared,) = [p for p in text.split("\n## ") if p.startswith("1. ")]
    assert not [name for name in Settings.__struct_fields__ if f"`{name}" not in shared]


def on_wire(channel: Channel[Any], message: Message, payload: Payload | None = None) -> int:
    """A message's bytes, without keys."""
    frames = channel.pack(message, None if payload is None else encode(payload))
    return sum(zmtp_bytes(len(frame)) for frame in frames)


def step_bytes(*runs: Run) -> int:
    """Those of a step along scalars, its payload left out."""
    scalars = Scalars(runs, np.ones(sum(run.count for run in runs), np.float32))
    step = Step(version=7, round=7, digest=bytes(16), payload=spec_of(scalars))
    return on_wire(to_node, step, scalars) - scalars.values.nbytes


def test_the_methods_page_has_the_sizes_of_messages() -> None:
    scalar = Scalars((Run(3, 1),), np.ones(1, np.float32))
    update = Update(round=7, client=3, examples=16, loss=0.61, payload=spec_of(scalar))
    costs = (Cost("train", 1.2, 1 << 30), Cost("encode", 0.001, 1 << 30), Cost("wait", 0.2))
    bare = on_wire(to_coordinator, update, scalar)
    costly = on_wire(to_coordinator, replace(update, costs=costs), scalar)
    task = Task(round=7, client=3, version=6)
    plain = on_wire(to_node, task)
    near, far = (on_wire(to_node, replace(task, picks=(p,))) - plain for p in (1, 1 << 32))
    empty = step_bytes()
    few = step_bytes(Run(0, 8, 0.01)) - empty
    many = step_bytes(Run(0, 100_000, 0.01, 1, (1 << 32,))) - empty
    absent = step_bytes(Run(0, 0), Run(3, 1, 0.01, 16)) - step_bytes(Run(3, 1, 0.01, 16))
    runs = [step_bytes(Run(c, 1, 0.01, n)) - empty for c, n in ((3, 16), (999_999, 70_000))]
    text = " ".join(page("methods.md").split())
    for quoted in (
        f"one scalar is {bare} bytes on the wire",
        f"three phases of costs add {costly - bare};",
        f"a `task` is {plain}, a `beat` {on_wire(to_node, Beat())}.",
        f"each frame is {zmtp_bytes(1, 'curve') - zmtp_bytes(1)} more",
        f"{near} to {far} bytes with the field's name",
        f"{few} to {many} bytes longer than an empty one",
        f"An empty step is {empty} bytes",
        f"run is empty ({absent} bytes)",
        f"some {runs[0]} to {runs[1]} bytes beside its 4 K",
    ):
        assert quoted in text, quoted


# --- errors.md -------------------------------------------------------------------


def test_every_exit_code_is_listed_with_its_error() -> None:
    table = section("errors.md", "1. Exit codes")
    kinds: list[type[SeedwireError] | type[DeployError]]
    kinds = [*SeedwireError.__subclasses__(), *DeployError.__subclasses__()]
    for kind in kinds:
        assert f"| {kind.exit_code} | `{kind.__name__}` |" in table
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    ours = {kind.exit_code for kind in kinds}
    assert len(ours) == len(kinds)
    assert listed == ours | {0, 1, 2, INTERRUPTED}


def test_every_reason_that_the_round_machine_gives_is_listed() -> None:
    source = (DOCS.parent / "coordinator" / "rounds.py").read_text()
    refusals = source[source.index("def _refusal") : source.index("def _close")]
    reasons = re.findall(r'return f?"([^"{]+)', refusals)
    reasons += re.findall(r'(?:_reject\(|_between\(state, )event, "([^"]+)"\)', source)
    assert len(reasons) > 6
    text = section("errors.md", "3. Why an update is discarded")
    assert not [why for why in reasons if f"`{why.strip()}" not in text]


# --- summary.md ------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A run of no rounds, finished."""
    tensors = (TensorInfo("w", (2, 3), "w"),)
    table = {"run": {"name": "r"}, "model": {"id": "m"}, "data": {"id": "d"}}
    e = experiment.convert(table | {"rounds": {"count": 1}, "method": {"name": "fedavg"}}, "here")
    journal = Journal(tmp_path, is_new=True)
    recorder = RunRecorder(tmp_path, e, journal)
    recorder.begin()
    space = ParamSpace.of(tensors)
    central = Central(fedavg(FedAvg(), space), space, np.zeros(6, np.float32), Archive(journal))
    score = Score(version=0, loss=1.0, metric=0.5, examples=2)
    recorder.scored(0, score)
    summary = recorder.finish(central, None)
    journal.close()
    return tmp_path, summary


def leaves(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_every_key_of_the_summary_is_defined(run: tuple[Path, dict[str, Any]]) -> None:
    described = rows(section("summary.md", "summary.json"))
    # by kind, way, phase and node, of which there was none
    open_ended = {"bytes_by_kind", "own_over_kernel", "seconds.by_phase", "unexplained"}
    assert set(leaves(run[1])) - open_ended <= described.keys()
    assert not [key for key in open_ended if f"`{key}." not in page("summary.md")]
    assert f"is {SUMMARY_VERSION}." in section("summary.md", "The promise")


def test_every_file_of_a_run_is_described(run: tuple[Path, dict[str, Any]]) -> None:
    text = page("summary.md")
    assert not [path.name for path in run[0].iterdir() if f"`{path.name}`" not in text]


def test_the_carriers_are_the_messages_that_list_a_payload() -> None:
    carriers = {tag(kind) for kind in MESSAGES if issubclass(kind, Carrier)}
    text = page("protocol.md")
    parts = re.findall(r"^### `(\w+)`\n(.*?)(?=^#)", text, re.MULTILINE | re.DOTALL)
    assert {name for name, part in parts if "| `payload` |" in part} == carriers
