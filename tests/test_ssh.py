"""Commands on hosts: what is given to ``ssh``, and what is made of its answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from deploy.errors import DeployError, HostError
from deploy.hosts import Host
from deploy.parallel import Say, each
from deploy.ssh import Remote, quote, remotes
from tests.sshd import sshd

FAKE = """#!/bin/sh
# Notes its arguments, and runs what it is told here, as if this were the host.
[ "$1" = -O ] && exit 0
for word; do printf '%s\\n' "$word" >> "$SSH_LOG"; done
[ -n "$SSH_SAYS" ] && { echo "$SSH_SAYS" >&2; exit 255; }
while :; do
  case "$1" in -o|-F|-l|-p) shift 2 ;; --) shift; break ;; *) break ;; esac
done
shift
exec sh -c "$*"
"""
HOST = Host(name="pi", address="pi.local", directory="~/.seedwire", user="u", port=2222)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ``ssh`` that runs commands here; returns the file of its arguments, one a line."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(FAKE)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SSH_LOG", str(tmp_path / "arguments"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "arguments"


def test_a_command_goes_to_ssh_with_what_the_inventory_says(fake: Path, tmp_path: Path) -> None:
    host = msgspec.structs.replace(HOST, ssh_config=tmp_path / "config")
    done = Remote(host).run(["echo", "a b"])
    assert (done.rc, done.text) == (0, "a b")
    words = fake.read_text().splitlines()
    assert words[-3:] == ["--", "pi.local", "echo 'a b'"]
    for option in ("BatchMode=yes", f"-F\n{tmp_path}/config", "-l\nu", "-p\n2222"):
        assert f"\n{option}\n" in fake.read_text()
    assert "ControlPath" not in fake.read_text()


def test_what_is_not_said_is_left_to_ssh(fake: Path) -> None:
    Remote(Host(name="a", address="a", directory="/d")).run(["true"])
    assert not {"-l", "-p", "-F"} & set(fake.read_text().splitlines())


WORDS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=20)


@given(st.lists(WORDS.filter(lambda word: word != "~" and word[:2] != "~/"), max_size=4))
@settings(max_examples=25)
def test_words_arrive_as_they_are(words: list[str]) -> None:
    line = " ".join(quote(word) for word in words)
    code = "import os, sys; print(ascii([os.fsencode(w) for w in sys.argv[1:]]))"
    command = f"{quote(sys.executable)} -c {quote(code)} {line}"
    out = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ascii([os.fsencode(word) for word in words])


def test_home_is_the_hosts_and_the_rest_of_the_path_is_quoted(fake: Path, tmp_path: Path) -> None:
    out = Remote(HOST).run(["printf", "%s,", "~/a b", "~", "x~/y", "$HOME"]).text
    home = tmp_path / "home"
    assert out == f"{home}/a b,{home},x~/y,$HOME,"


def test_standard_input_standard_error_and_exit_code_are_carried(fake: Path) -> None:
    done = Remote(HOST).run(["sh", "-c", "cat; echo no >&2; exit 3"], stdin=b"\xff\n")
    assert (done.rc, done.out, done.err, done.why) == (3, b"\xff\n", b"no\n", "no")
    with pytest.raises(HostError, match=r"^sh: no$"):
        Remote(HOST).run(["sh", "-c", "echo no >&2; exit 3"], check=True)


@pytest.mark.parametrize(
    ("said", "mending"),
    [
        ("u@pi.local: Permission denied (publickey).", "ssh-copy-id u@pi.local"),
        ("ssh: Could not resolve hostname pi.local: Name", "correct `address`"),
        ("Host key verification failed.", "log in once by hand: ssh u@pi.local"),
        ("ssh: connect to host pi.local port 22: Connection refused", "start sshd"),
        ("ssh: connect to host pi.local port 22: Connection timed out", "is it on"),
    ],
)
def test_a_host_that_is_not_reached_comes_with_what_to_do(
    fake: Path, monkeypatch: pytest.MonkeyPatch, said: str, mending: str
) -> None:
    monkeypatch.setenv("SSH_SAYS", said)
    with pytest.raises(HostError) as caught:
        Remote(HOST).run(["true"])
    assert str(caught.value).startswith(f"{said}: ")
    assert mending in str(caught.value)


def test_a_host_that_does_not_answer_is_given_up(fake: Path) -> None:
    with pytest.raises(HostError, match="no answer within 0 s"):
        Remote(HOST).run(["sleep", "60"], timeout=0.2)


def test_rsync_uses_the_same_ssh(fake: Path, tmp_path: Path) -> None:
    remote = Remote(HOST)
    assert remote.path("~/x/") == "pi.local:x/"
    assert Remote(msgspec.structs.replace(HOST, address="::1")).path("/x") == "[::1]:/x"
    (tmp_path / "home").mkdir()
    (tmp_path / "file").write_text("content")
    remote.rsync(["-a", str(tmp_path / "file"), remote.path(f"{tmp_path}/home/a b")])
    assert (tmp_path / "home" / "a b").read_text() == "content"
    assert "BatchMode=yes" in fake.read_text()
    with pytest.raises(HostError, match="some files"):
        remote.rsync(["-a", str(tmp_path / "gone"), remote.path("x")])


# --- all at once -----------------------------------------------------------------


def hosts(*names: str) -> list[Remote]:
    return [Remote(Host(name=name, address=name, directory="/d")) for name in names]


def test_no_failure_hides_another_and_all_hosts_are_done_at_once() -> None:
    together = threading.Barrier(3, timeout=30.0)

    def work(remote: Remote, say: Say) -> str:
        together.wait()
        say("half done")
        if remote.host.name != "b":
            raise HostError(f"no {remote.host.name}")
        return "well"

    with open(os.devnull, "w") as file:
        outcome = each(hosts("a", "b", "c"), work, Console(file=file))
    assert outcome.done == {"b": "well"}
    assert {name: str(error) for name, error in outcome.failed.items()} == {
        "a": "no a",
        "c": "no c",
    }
    assert all(isinstance(error, DeployError) for error in outcome.failed.values())


def test_where_there_is_no_terminal_each_host_has_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(remote: Remote, say: Say) -> None:
        say("half done")
        say(f"[bold] of {remote.host.name}")

    each(hosts("a", "b"), work)
    assert sorted(capsys.readouterr().err.splitlines()) == ["a: [bold] of a", "b: [bold] of b"]


def test_a_defect_is_raised_after_all_are_done() -> None:
    seen: list[str] = []

    def work(remote: Remote, say: Say) -> None:
        seen.append(remote.host.name)
        raise ZeroDivisionError

    with open(os.devnull, "w") as file, pytest.raises(ZeroDivisionError):
        each(hosts("a", "b"), work, Console(file=file))
    assert sorted(seen) == ["a", "b"]


def test_an_interrupt_ends_what_hosts_are_doing(fake: Path, tmp_path: Path) -> None:
    """Ctrl-C while three hosts are busy: raised at once, their commands ended."""
    busy = threading.Barrier(4, timeout=30.0)

    def work(remote: Remote, say: Say) -> None:
        busy.wait()
        remote.run(["sleep", "600"], timeout=600.0)

    def interrupt() -> None:
        busy.wait()
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with open(os.devnull, "w") as file, pytest.raises(KeyboardInterrupt):
            each(hosts("a", "b", "c"), work, Console(file=file))
    finally:
        signal.signal(signal.SIGINT, before)
        thread.join()


# --- a real one ------------------------------------------------------------------


@pytest.mark.net
def test_ten_commands_cost_one_login_and_nothing_is_left_behind(tmp_path: Path) -> None:
    with sshd(tmp_path / "sshd") as config:
        host = Host(name="a", address="a", directory=str(tmp_path), ssh_config=config)
        with remotes([host]) as (remote,):
            sockets = next(o for o in remote.options if o.startswith("ControlPath="))
            place = Path(sockets.partition("=")[2]).parent
            said = [remote.run(["sh", "-c", "cat; echo 'é'"], stdin=b"%d " % i) for i in range(10)]
            assert [done.text for done in said] == [f"{i} é" for i in range(10)]
            remote.rsync(["-a", str(config), remote.path(f"{tmp_path}/copy")])
            assert place.stat().st_mode & 0o077 == 0
        assert (tmp_path / "copy").exists()
        assert not place.exists()
        assert (tmp_path / "sshd" / "log").read_text().count("Accepted publickey") == 1
