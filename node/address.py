"""By which address this machine reaches a coordinator, and so can be reached beside it."""

from __future__ import annotations

import socket


def facing(endpoint: str) -> str | None:
    """This machine's own address on the way to ``tcp://HOST:PORT``; nothing is sent.

    Returns:
        A number, IPv4 or IPv6; None where there is no way.
    """
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    try:
        for family, kind, _, _, where in socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_DGRAM
        ):
            with socket.socket(family, kind) as probe:
                probe.connect(where)
                return str(probe.getsockname()[0])
    except (OSError, ValueError):
        return None
    return None
