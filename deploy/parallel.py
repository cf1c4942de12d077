"""The same function for all hosts at once: a line of progress each, and every failure told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from deploy.errors import DeployError
from deploy.ssh import Remote

TURN_SECONDS = 0.2  # a signal may reach another thread than the one that waits

T = TypeVar("T")
Say = Callable[[str], None]


@dataclass
class Outcome(Generic[T]):
    """What a function came to on each host, by name, in the hosts' order.

    Attributes:
        done: what it returned.
        failed: why it did not.
    """

    done: dict[str, T] = field(default_factory=dict)
    failed: dict[str, DeployError] = field(default_factory=dict)


def each(
    hosts: Sequence[Remote],
    function: Callable[[Remote, Say], T],
    console: Console | None = None,
) -> Outcome[T]:
    """Call a function for all hosts at once, with a line of progress for each.

    Args:
        hosts: from ``remotes``.
        function: gets the host, and what sets the text of its line.
        console: where the lines go; by default standard error.

    Raises:
        Exception: one that is no ``DeployError``, after all hosts are done: a defect.
    """
    console = console or Console(stderr=True)
    lines = _Lines(console, [remote.host.name for remote in hosts])
    outcome: Outcome[T] = Outcome()
    futures: dict[str, Future[T]] = {}
    with lines.progress, ThreadPoolExecutor(max(1, len(hosts))) as pool:
        try:
            for remote in hosts:
                futures[remote.host.name] = pool.submit(lines.follow, remote, function)
            while wait(futures.values(), TURN_SECONDS).not_done:
                pass
        except BaseException:  # Ctrl-C: not to wait for what hosts are doing
            for remote in hosts:
                remote.abort()
            raise
    for name, future in futures.items():
        if isinstance(error := future.exception(), DeployError):
            outcome.failed[name] = error
    for name, future in futures.items():
        if name not in outcome.failed:
            outcome.done[name] = future.result()
    return outcome


class _Lines:
    """A line per host: moving ones on a terminal, elsewhere one when it is done."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        columns = (SpinnerColumn(finished_text=" "), TextColumn("{task.description}"))
        text = TextColumn("{task.fields[text]}", markup=False)
        self._console = console
        self.progress = Progress(
            *columns, TimeElapsedColumn(), text, console=console, disable=not console.is_terminal
        )
        self._tasks: dict[str, TaskID] = {
            name: self.progress.add_task(name, total=1, text="") for name in names
        }

    def follow(self, remote: Remote, function: Callable[[Remote, Say], T]) -> T:
        name, said = remote.host.name, ""

        def say(text: str) -> None:
            nonlocal said
            said = text
            self.progress.update(self._tasks[name], text=text)

        try:
            result = function(remote, say)
        except BaseException as error:
            said = str(error) or type(error).__name__
            raise
        finally:
            self.progress.update(self._tasks[name], text=said, completed=1)
            if not self._console.is_terminal and said:
                self._console.print(f"{name}: {said}", soft_wrap=True, markup=False)
        return result
