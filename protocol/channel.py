"""Messages to frames and back, one union per direction.

Every field is checked on both ways, so a bad message is refused with the path of the fault,
and what the other side would refuse does not leave here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec

from protocol import wire
from protocol.messages import Carrier, Chunk, Message, Refuse, ToCoordinator, ToNode
from protocol.wire import Frame, LocalProtocolError, RemoteProtocolError

M = TypeVar("M", bound=Message)


class Channel(Generic[M]):
    """Packs and unpacks the messages of one direction."""

    def __init__(self, union: Any) -> None:
        self._union = union

    def pack(self, message: M, buffer: Frame | None = None) -> list[Frame]:
        """Encode to frames; what the other side would refuse does not leave here.

        Raises:
            LocalProtocolError: a field is out of bounds, or the buffer does not fit.
        """
        buffers = [] if buffer is None else [buffer]
        if (why := _misfit(message, buffers)) is not None:
            raise LocalProtocolError(why)
        body = msgspec.to_builtins(message, builtin_types=(bytes,))
        try:
            msgspec.convert(body, self._union)
        except msgspec.ValidationError as error:
            raise LocalProtocolError(f"{type(message).__name__}: {error}") from error
        for cost in body.get("costs", ()):
            while cost[-1] is None:
                cost.pop()
        return wire.pack(body, buffers)

    def unpack(self, frames: Sequence[Frame]) -> tuple[M, Frame | None]:
        """Decode frames.

        Raises:
            VersionError: another protocol version.
            RemoteProtocolError: anything else that ``pack`` could not have produced.
        """
        body, buffers = wire.unpack(frames)
        try:
            message: M = msgspec.convert(body, self._union)
        except (msgspec.ValidationError, RecursionError) as error:
            raise RemoteProtocolError(str(error) or "nested too deeply") from error
        if (why := _misfit(message, buffers)) is not None:
            raise RemoteProtocolError(why)
        return message, buffers[0] if buffers else None


to_coordinator: Channel[ToCoordinator] = Channel(ToCoordinator)
to_node: Channel[ToNode] = Channel(ToNode)


def read_refusal(frames: Sequence[Frame]) -> Refuse | None:
    """A refusal from a peer of any protocol version, or None if it is something else."""
    try:
        body, _ = wire.unpack(frames, any_version=True)
        message: object = msgspec.convert(body, ToNode)  # a union, so that the tag is required
    except (RemoteProtocolError, msgspec.ValidationError, RecursionError):
        return None
    return message if isinstance(message, Refuse) else None


def _misfit(message: Message, buffers: Sequence[Frame]) -> str | None:
    """Say why the buffers do not fit the message, or None."""
    if isinstance(message, Chunk):
        expected = 0 if message.gone else 1
    elif isinstance(message, Carrier):
        if message.blob is not None and message.payload is None:
            return "a blob without a payload"
        expected = int(message.payload is not None and message.blob is None)
    else:
        expected = 0
    if len(buffers) != expected:
        return f"{len(buffers)} buffers, want {expected}"
    if buffers and isinstance(message, Carrier) and message.payload is not None:
        got, want = len(buffers[0]), message.payload.nbytes
        return None if got == want else f"buffer of {got} bytes, spec says {want}"
    return None
