"""Stands in for a coordinator while ports are checked: greets who connects, until its input ends.

Runs on the coordinator's machine, by its own Python: for Python 3.8 and its library.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading

GREETING = b"s"  # as deploy.probe expects it


def answer(listener: socket.socket) -> None:
    """Greet all who connect."""
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(GREETING)


def main(host: str, port: str) -> None:
    """Listen, say "ready", "taken" (a coordinator may run already) or why not, and stay."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("" if host == "*" else host, int(port)))
            listener.listen(64)
        except OSError as error:
            print("taken" if error.errno == errno.EADDRINUSE else error.strerror, flush=True)
            return
        print("ready", flush=True)
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        while os.read(0, 4096):
            pass


if __name__ == "__main__":
    main(*sys.argv[1:])
