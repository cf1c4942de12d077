"""One message = frames ``[version][msgpack body][buffer]...``; bytes in, plain values out.

``docs/protocol.md`` is the specification.  The checks come cheapest first, and the
only exception that bad input can cause is ``RemoteProtocolError``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgpack

VERSION = 4
MAX_BODY_BYTES = 1 << 20
MAX_INLINE_BYTES = 1 << 20  # a larger payload is pulled in chunks (protocol.blobs)
MAX_FRAMES = 3
BEAT = {"type": "beat"}  # the one body that is left out: a frame costs 35 bytes under CURVE
MAX_ARRAY = 1 << 13  # items of one array in a body; nested headers cost memory before items do
Frame = bytes | memoryview


class Peer(NamedTuple):
    """One connection, from its handshake to its end.

    Attributes:
        id: ZeroMQ's routing id.  The other side may choose it, so it proves nothing.
        key: the other side's public key in hex, which the handshake proved; "" without keys.
        fd: the connection's file descriptor in this process; -1 where there is none.
    """

    id: bytes
    key: str = ""
    fd: int = -1


class ProtocolError(Exception):
    """A message broke the specification.  Never raised itself."""


class LocalProtocolError(ProtocolError):
    """We were about to send something illegal: a bug here."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something illegal: drop it, count it, stay up."""


class VersionError(RemoteProtocolError):
    """The peer speaks another version of the protocol; ``theirs`` says which."""

    def __init__(self, theirs: int) -> None:
        super().__init__(f"peer speaks protocol {theirs}, this is protocol {VERSION}")
        self.theirs = theirs


def pack(body: dict[str, Any], buffers: Sequence[Frame] = ()) -> list[Frame]:
    """Encode to multipart frames.

    Raises:
        LocalProtocolError: the body or a buffer is over its limit, or the body holds what
            msgpack cannot, e.g. a lone surrogate or an integer over 64 bits.
    """
    try:
        data: bytes = msgpack.packb(body)
    except (TypeError, ValueError, OverflowError) as error:
        raise LocalProtocolError(f"body: {type(error).__name__} {error}") from error
    if len(data) > MAX_BODY_BYTES or any(len(b) > MAX_INLINE_BYTES for b in buffers):
        sizes = [len(data), *map(len, buffers)]
        raise LocalProtocolError(f"message of {sizes} bytes is over the limit")
    if body == BEAT and not buffers:
        return [bytes([VERSION])]
    return [bytes([VERSION]), data, *buffers]


def unpack(frames: Sequence[Frame], any_version: bool = False) -> tuple[Any, Sequence[Frame]]:
    """Decode multipart frames to a plain value and the buffers.

    Args:
        frames: as received.
        any_version: decode the body whatever the version says; only a ``refuse`` may be
            read this way, because its layout is the same in every version.

    Raises:
        VersionError: the version frame is well-formed and not ours.
        RemoteProtocolError: any other input that ``pack`` could not have produced.
    """
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise RemoteProtocolError(f"{len(frames)} frames")
    if len(frames[0]) != 1:
        raise RemoteProtocolError(f"version frame of {len(frames[0])} bytes")
    if frames[0][0] != VERSION and not any_version:
        raise VersionError(frames[0][0])
    if len(frames) == 1:
        return dict(BEAT), ()
    if len(frames[1]) > MAX_BODY_BYTES:
        raise RemoteProtocolError(f"body of {len(frames[1])} bytes")
    if any(len(buffer) > MAX_INLINE_BYTES for buffer in frames[2:]):
        raise RemoteProtocolError(f"buffer of {max(map(len, frames[2:]))} bytes")
    try:
        body = msgpack.unpackb(
            frames[1],
            strict_map_key=True,
            max_str_len=1 << 16,
            max_bin_len=1 << 10,
            max_array_len=MAX_ARRAY,
            max_map_len=1 << 10,
            max_ext_len=0,
            ext_hook=_no_extension,
        )
    except (ValueError, RecursionError) as error:  # msgpack's own errors are ValueErrors
        raise RemoteProtocolError(f"body: {type(error).__name__} {error}".rstrip()) from error
    return body, frames[2:]


def _no_extension(code: int, data: bytes) -> None:
    """An extension of no bytes passes ``max_ext_len``."""
    raise ValueError(f"extension type {code}")
