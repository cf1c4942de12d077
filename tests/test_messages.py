from __future__ import annotations

import contextlib
import math
from typing import Any, get_args

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import wire
from protocol.channel import Channel, read_refusal, to_coordinator, to_node
from protocol.messages import (
    Beat,
    Both,
    Bye,
    Carrier,
    Chunk,
    Enroll,
    Enrolled,
    Evaluate,
    Failed,
    Hello,
    Message,
    Pull,
    Ready,
    Reduce,
    Reduced,
    Refuse,
    Reject,
    Score,
    Step,
    Sync,
    Task,
    ToCoordinator,
    ToNode,
    Update,
    Welcome,
)
from protocol.parts import Cost, Exchanged, Meeting, Progress, TensorInfo, Vitals
from protocol.payload import DenseSpec, Run, ScalarsSpec, SparseSpec
from protocol.wire import LocalProtocolError, RemoteProtocolError, VersionError

ALL = Channel[Any](ToCoordinator | ToNode)
VERSION = bytes([wire.VERSION])

text = st.text(max_size=30)
sizes = st.integers(0, 1 << 40)
versions = st.integers(0, (1 << 53) - 1)
rounds = st.integers(0, (1 << 31) - 1)
clients = st.integers(0, 999_999)
reals = st.floats(-1e30, 1e30)
seconds = st.floats(0, 1e9)
digests = st.binary(min_size=16, max_size=16)
small = st.integers(0, 50)
names = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")


def tuples(of: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(of, max_size=3).map(tuple)


picked = st.sampled_from([(), (0, 7), ((1 << 32) - 50,), (3, -2, 9)])
specs = st.one_of(
    st.builds(
        ScalarsSpec,
        runs=tuples(
            st.builds(Run, clients, st.integers(4, 50), st.floats(-1e30, 1e30), picks=picked)
        ),
    ),
    st.builds(
        SparseSpec,
        size=small,
        count=small,
        place_nbytes=small,
        coding=st.sampled_from(["f32", "int8", "sign"]),
    ),
    st.builds(DenseSpec, count=small, units=tuples(sizes)),
)
# the empty carrier, an inline payload, and a payload to be pulled
carried: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"payload": specs}),
    st.fixed_dictionaries({"payload": specs, "blob": versions}),
)
phases = st.sampled_from(["load", "inference", "catch-up", "train", "encode", "reduce"])
maybe = st.none() | sizes
costs = tuples(st.builds(Cost, phases, seconds, maybe, maybe, maybe, st.none() | seconds))
vitals = st.none() | st.builds(
    Vitals,
    pss=maybe,
    swap=maybe,
    group_peak=maybe,
    is_unified=st.booleans(),
    nvmap=maybe,
    celsius=st.none() | st.floats(-273.15, 1000),
    throttled=st.none() | st.sampled_from(["", "under-voltage"]),
    sent=maybe,
    received=maybe,
    resent=maybe,
    rtt=st.none() | seconds,
)
meetings = st.builds(Meeting, address=text, port=st.integers(1, 65_535))
tensors = tuples(st.builds(TensorInfo, text, tuples(sizes), text))
tables = st.dictionaries(
    text, st.recursive(text | st.integers(0, 9), lambda v: st.lists(v) | st.dictionaries(text, v))
)


def carrier(cls: type[Message], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.tuples(carried, st.fixed_dictionaries(fields)).map(lambda t: cls(**t[0], **t[1]))


where = {"round": rounds, "attempt": rounds, "client": clients}
MESSAGES: dict[type[Message], st.SearchStrategy[Any]] = {
    Beat: st.builds(
        Beat,
        busy=text,
        progress=st.none()
        | st.builds(Progress, round=rounds, client=clients, done=rounds, total=rounds),
    ),
    Pull: st.builds(Pull, blob=versions, offset=sizes, nbytes=st.integers(1, 1 << 20)),
    Chunk: st.builds(Chunk, blob=versions, offset=sizes, gone=st.booleans()),
    Bye: st.builds(Bye, reason=text, finished=st.booleans()),
    Hello: st.builds(
        Hello,
        node=names,
        software=text,
        stream=text,
        clients=tuples(clients),
        role=st.sampled_from(["train", "evaluate"]),
        host=text,
        pid=sizes,
    ),
    Enroll: st.builds(Enroll, node=names, key=st.binary(min_size=32, max_size=32)),
    Enrolled: st.builds(Enrolled),
    Ready: carrier(
        Ready,
        version=versions,
        digest=digests,
        space=digests,
        tensors=tensors,
        costs=costs,
        vitals=vitals,
        meeting=st.none() | meetings,
    ),
    Update: carrier(
        Update,
        **where,
        examples=st.integers(1, (1 << 40) - 1),
        loss=reals,
        costs=costs,
        vitals=vitals,
    ),
    Failed: st.builds(Failed, **where, reason=text),
    Reduced: carrier(
        Reduced,
        round=rounds,
        attempt=rounds,
        digest=st.none() | digests,
        fault=text,
        exchanged=st.builds(
            Exchanged, payload=sizes, message=sizes, sent=maybe, received=maybe, resent=maybe
        ),
        costs=costs,
    ),
    Score: st.builds(
        Score,
        version=versions,
        loss=reals,
        metric=reals,
        examples=versions.map(lambda n: n >> 13),
        rouge_l=st.none() | st.floats(0, 1),
    ),
    Sync: st.builds(Sync, version=versions, reason=text),
    Welcome: st.builds(Welcome, run=text, experiment=tables),
    Refuse: st.builds(Refuse, code=text, reason=text),
    Reduce: st.builds(
        Reduce,
        round=rounds,
        attempt=rounds,
        version=versions,
        clients=st.lists(clients, min_size=1, max_size=3).map(tuple),
        examples=st.integers(1, (1 << 40) - 1),
        rank=small,
        ranks=st.integers(1, 50),
        address=text,
        meeting=meetings,
        seconds=st.floats(1, 1e6),
    ),
    Task: st.builds(
        Task,
        **where,
        version=versions,
        units=tuples(st.integers(0, (1 << 20) - 1)),
        picks=tuples(st.integers(1 - (1 << 32), (1 << 32) - 1)),
    ),
    Step: carrier(Step, version=versions, round=rounds, digest=digests, snapshot=st.booleans()),
    Evaluate: st.builds(Evaluate, version=versions, last=st.booleans()),
    Reject: st.builds(Reject, **where, reason=text),
}
messages: st.SearchStrategy[Any] = st.one_of(*MESSAGES.values())


def buffer_for(message: Message) -> bytes | None:
    if isinstance(message, Chunk):
        return None if message.gone else b"some"
    if isinstance(message, Carrier) and message.payload is not None and message.blob is None:
        return bytes(message.payload.nbytes)
    return None


def body_of(message: Message) -> dict[str, Any]:
    frames = ALL.pack(message, buffer_for(message))
    body: dict[str, Any] = msgpack.unpackb(frames[1]) if len(frames) > 1 else {"type": "beat"}
    return body


def receive(body: object, channel: Channel[Any] = ALL) -> Any:
    return channel.unpack([VERSION, msgpack.packb(body)])[0]


UPDATE = Update(
    round=7,
    attempt=1,
    client=3,
    examples=32,
    loss=0.5,
    payload=ScalarsSpec((Run(3, 2),)),
    costs=(Cost("train", 1.25, rss=1 << 20),),
)
TASK = Task(round=7, attempt=0, client=3, version=6, units=(0, 2))
STEP = Step(version=7, round=7, digest=bytes(range(16)), payload=SparseSpec(64, 2, 9, "int8"))
PLAIN = {"type": "update", "round": 1, "attempt": 0, "client": 2, "examples": 3, "loss": 0.5}


def test_every_message_type_has_a_strategy() -> None:
    assert set(get_args(ToCoordinator)) | set(get_args(ToNode)) == MESSAGES.keys()
    assert set(get_args(ToCoordinator)) & set(get_args(ToNode)) == set(get_args(Both))


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
@given(data=st.data())
def test_unpack_inverts_pack(cls: type[Message], data: st.DataObject) -> None:
    message = data.draw(MESSAGES[cls])
    buffer = buffer_for(message)
    for channel, union in ((to_coordinator, ToCoordinator), (to_node, ToNode)):
        if cls in get_args(union):
            assert channel.unpack(channel.pack(message, buffer)) == (message, buffer)
            continue
        wrong_way = r"Invalid value '.*' - at `\$.type`"
        with pytest.raises(LocalProtocolError, match=wrong_way):
            channel.pack(message, buffer)
        with pytest.raises(RemoteProtocolError, match=wrong_way):
            channel.unpack(ALL.pack(message, buffer))


@given(messages, st.data())
def test_one_flipped_bit_never_escapes_as_another_exception(
    message: Message, data: st.DataObject
) -> None:
    frames = ALL.pack(message, buffer_for(message))
    place = min(1, len(frames) - 1)  # the body, if there is one
    body = bytearray(frames[place])
    body[data.draw(st.integers(0, len(body) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(RemoteProtocolError):
        ALL.unpack([*frames[:place], bytes(body), *frames[place + 1 :]])


@given(st.lists(st.binary(max_size=60), max_size=4))
def test_unpack_of_garbage_raises_only_remote_protocol_error(frames: list[bytes]) -> None:
    with contextlib.suppress(RemoteProtocolError):
        ALL.unpack(frames)
    read_refusal(frames)  # raises nothing at all


@given(st.recursive(text | st.integers() | st.none(), lambda v: st.lists(v) | tables))
def test_any_plain_value_as_a_body_raises_only_remote_protocol_error(body: object) -> None:
    with contextlib.suppress(RemoteProtocolError, OverflowError):  # packing 2**64 overflows
        receive(body)


def test_a_body_nested_past_the_recursion_limit_is_refused() -> None:
    body = b"\x82\xa4type\xa3bye\xa1z" + b"\x91" * 60_000 + b"\xc0"
    with pytest.raises(RemoteProtocolError):
        ALL.unpack([VERSION, body])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("field", "value", "path"),
    [
        ("loss", lambda x: x, "$.loss"),
        ("costs", lambda x: [["train", x]], "$.costs[0][1]"),
        (
            "payload",
            lambda x: {"kind": "scalars", "runs": [[1, 0], [1, 0, x]]},
            "$.payload.runs[1][2]",
        ),
    ],
)
def test_what_is_not_finite_is_refused_with_its_path(
    bad: float, field: str, value: Any, path: str
) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        receive({**PLAIN, field: value(bad)})
    assert f"`{path}`" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"round": -1}, "$.round"),
        ({"round": 1 << 31}, "$.round"),
        ({"round": "1"}, "$.round"),
        ({"round": 1.5}, "$.round"),
        ({"client": 1_000_000}, "$.client"),
        ({"examples": 0}, "$.examples"),  # all clients at weight 0 have no mean
        ({"examples": 1 << 40}, "$.examples"),
        ({"loss": 1e31}, "$.loss"),
        ({"loss": None}, "$.loss"),
        ({"costs": [["sleep", 1.0]]}, "$.costs[0][0]"),
        ({"payload": {"kind": "dense", "count": -1}}, "$.payload.count"),
        ({"payload": {"kind": "dense", "count": (1 << 40) + 1}}, "$.payload.count"),
        ({"payload": {"kind": "zip"}}, "$.payload.kind"),
        (
            {
                "payload": {
                    "kind": "sparse",
                    "size": 1,
                    "count": 1,
                    "place_nbytes": 1,
                    "coding": "x",
                }
            },
            "$.payload.coding",
        ),
        ({"type": "upgrade"}, "$.type"),
    ],
)
def test_a_field_out_of_bounds_is_refused_with_its_path(change: dict[str, Any], path: str) -> None:
    receive(PLAIN)
    with pytest.raises(RemoteProtocolError) as caught:
        receive({**PLAIN, **change})
    assert f"`{path}`" in str(caught.value)


@pytest.mark.parametrize("name", ["", "-a", "a/b", "a b", "a\n", "é", "a" * 64])
def test_node_names_are_safe_as_file_names(name: str) -> None:
    body = body_of(Hello(node="a", software="", stream=""))
    with pytest.raises(RemoteProtocolError, match=r"\$.node"):
        receive({**body, "node": name})


def test_text_is_bounded() -> None:
    assert receive({"type": "bye", "reason": "x" * 2000}) == Bye(reason="x" * 2000)
    with pytest.raises(RemoteProtocolError, match="length <= 2000"):
        receive({"type": "bye", "reason": "x" * 2001})


def test_an_old_body_without_the_later_fields_is_accepted() -> None:
    plain = Update(round=1, attempt=0, client=2, examples=3, loss=0.5)
    assert receive(PLAIN) == plain
    assert receive({"type": "beat"}) == Beat()
    assert receive({"type": "step", "version": 1, "round": 1, "digest": bytes(16)}) == Step(
        version=1, round=1, digest=bytes(16)
    )


@given(messages)
def test_a_newer_body_with_an_unknown_field_is_accepted(message: Message) -> None:
    if buffer_for(message) is None:
        assert receive({**body_of(message), "hint": {"battery": [1, None]}}) == message


def test_unknown_fields_inside_nested_structs_are_skipped() -> None:
    cost = ["train", 1.0, None, None, None, 2.0, {"volts": 5}]
    got = receive({**PLAIN, "costs": [cost], "vitals": {"fan": 1}})
    assert (got.costs, got.vitals) == ((Cost("train", 1.0, joules=2.0),), Vitals())


def test_what_a_phase_did_not_measure_may_be_left_out() -> None:
    assert receive({**PLAIN, "costs": [["train", 1.0]]}).costs == (Cost("train", 1.0),)


def test_another_version_is_a_version_error_whatever_the_body() -> None:
    with pytest.raises(VersionError) as caught:
        ALL.unpack([b"\x01", b"\xff"])
    assert caught.value.theirs == 1


@given(MESSAGES[Refuse], st.integers(0, 255))
def test_a_refusal_of_any_version_is_readable(message: Refuse, version: int) -> None:
    body = msgpack.packb({**body_of(message), "new": 1})
    assert read_refusal([bytes([version]), body]) == message


def test_read_refusal_takes_nothing_else_for_a_refusal() -> None:
    for message in (UPDATE, TASK, Beat(), Welcome(run="", experiment={})):
        assert read_refusal(ALL.pack(message, buffer_for(message))) is None
    untagged = msgpack.packb({"code": "version", "reason": "no tag"})
    assert read_refusal([b"\x02", untagged]) is None
    assert read_refusal([]) is None


# --- buffers that do not fit -----------------------------------------------------

MISFITS: dict[str, tuple[Message, bytes | None, str]] = {
    "short": (UPDATE, bytes(7), "buffer of 7 bytes, spec says 8"),
    "long": (UPDATE, bytes(9), "buffer of 9 bytes, spec says 8"),
    "missing": (UPDATE, None, "0 buffers, want 1"),
    "with a message that has none": (TASK, b"", "1 buffers, want 0"),
    "with an empty carrier": (
        Step(version=1, round=1, digest=bytes(16)),
        b"",
        "1 buffers, want 0",
    ),
    "beside a blob": (
        Step(version=1, round=1, digest=bytes(16), payload=DenseSpec(1), blob=1),
        bytes(4),
        "1 buffers, want 0",
    ),
    "blob of nothing": (
        Step(version=1, round=1, digest=bytes(16), blob=1),
        None,
        "a blob without a payload",
    ),
    "chunk without": (Chunk(blob=1, offset=0), None, "0 buffers, want 1"),
    "gone chunk with": (Chunk(blob=1, offset=0, gone=True), b"x", "1 buffers, want 0"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_buffer_that_does_not_fit_is_refused_on_both_sides(name: str) -> None:
    message, buffer, why = MISFITS[name]
    with pytest.raises(LocalProtocolError, match=why):
        ALL.pack(message, buffer)
    good = ALL.pack(message, buffer_for(message)) if name != "blob of nothing" else None
    body = good[1] if good else msgpack.packb({"type": "step", "blob": 1, **STEP_FIELDS})
    with pytest.raises(RemoteProtocolError, match=why):
        ALL.unpack([VERSION, body, *([] if buffer is None else [buffer])])


STEP_FIELDS = {"version": 1, "round": 1, "digest": bytes(16)}


# --- golden bytes: what is on the wire does not move -----------------------------


@pytest.mark.parametrize(
    ("message", "golden"),
    [
        (
            UPDATE,
            "88a474797065a6757064617465a77061796c6f616482a46b696e64a77363616c617273a472756e73"
            "91950302010190a5726f756e6407a7617474656d707401a6636c69656e7403a86578"
            "616d706c657320a46c6f7373cb3fe0000000000000a5636f7374739193a5747261696ecb"
            "3ff4000000000000ce00100000",
        ),
        (
            TASK,
            "85a474797065a47461736ba5726f756e6407a6636c69656e7403a776657273"
            "696f6e06a5756e697473920002",
        ),
        (
            STEP,
            "85a474797065a473746570a77061796c6f616485a46b696e64a6737061727365a473697a6540a563"
            "6f756e7402ac706c6163655f6e627974657309a6636f64696e67a4696e7438a776657273696f6e07"
            "a5726f756e6407a6646967657374c410000102030405060708090a0b0c0d0e0f",
        ),
    ],
    ids=["update", "task", "step"],
)
def test_golden_bytes(message: Message, golden: str) -> None:
    frames = ALL.pack(message, buffer_for(message))
    assert (frames[0], bytes(frames[1]).hex()) == (b"\x04", golden)
