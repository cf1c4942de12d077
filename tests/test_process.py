"""How a process of ours ends."""

from __future__ import annotations

import signal
import subprocess
import sys

ENDING = """
import os, signal, threading
from protocol.process import command_line

def linger():  # the interpreter waits for this thread when the main one is over
    threading.main_thread().join()
    print("over", flush=True)
    os.read(0, 1)

with command_line():
    threading.Thread(target=linger).start()
    try:
        print("begun", flush=True)
        signal.pause()
    finally:
        print("ending", flush=True)
        os.read(0, 1)
"""


def test_who_is_told_twice_to_end_says_nothing_of_it() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ENDING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        for word in ("begun", "ending", "over"):
            assert process.stdout.readline() == f"{word}\n"
            process.send_signal(signal.SIGTERM)
            if word != "begun":
                process.stdin.write("x")
                process.stdin.flush()
        assert process.stderr.read() == ""
        assert process.wait(20) == 130
