"""The options of ``seedwire node``: what each one is, and what its text means."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from node.engine import Ranks
    from protocol.parts import Limits


class Format(str, Enum):
    """How ``--dry-run`` says what it found."""

    TEXT = "text"
    JSON = "json"


Coordinator = Annotated[str, typer.Option(help="The coordinator: tcp://HOST:PORT.")]
Clients = Annotated[
    str, typer.Option(help="Clients hosted here, numbered from 0: 3 or 0-3 or 0,2,5-7.")
]
Name = Annotated[str, typer.Option(help="This node's name; by default the host's.")]
Keys = Annotated[
    Path | None,
    typer.Option(envvar="SEEDWIRE_KEYS", help="Where keys are: ~/.config/seedwire/keys."),
]
TokenText = Annotated[
    str,
    typer.Option(
        envvar="SEEDWIRE_TOKEN",
        help="Enrols this node, once. Others can see it here: better --token-file.",
    ),
]
TokenFile = Annotated[Path | None, typer.Option(help="A file that holds the token, mode 600.")]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Without keys, as the coordinator has to be.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Threads = Annotated[int, typer.Option(help="CPU threads for torch; 0 leaves it to it.")]
NumRanks = Annotated[
    int, typer.Option(min=1, help="Processes that share each task's work; not with torchrun.")
]
Fsdp = Annotated[
    bool, typer.Option("--fsdp", help="Deal the model's frozen weights among the ranks.")
]
RankPatience = Annotated[
    float, typer.Option(help="Seconds that one of them may keep the others waiting.")
]
GiveUp = Annotated[
    float, typer.Option(help="Seconds to look for a lost coordinator; 0 is for ever.")
]
Evaluate = Annotated[
    bool, typer.Option("--evaluate", help="Score the test set instead of training.")
]
Export = Annotated[Path | None, typer.Option(help="With --evaluate: save the final model here.")]
State = Annotated[
    Path | None, typer.Option(help="Keep what a restart would lose in this directory.")
]
Energy = Annotated[
    str, typer.Option(help="A command that prints joules so far; else the machine's meter.")
]
MaxMemory = Annotated[str, typer.Option(help="Resident memory that a task may take here: 900MB.")]
MaxBytes = Annotated[
    str, typer.Option(help="Payload that a round may take here, both ways: 200kB.")
]
MaxSeconds = Annotated[float, typer.Option(help="Time that a task may take here; 0 is for ever.")]
Lifeline = Annotated[bool, typer.Option("--lifeline", help="End when standard input closes.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Look whether all is ready, say so, and end.")
]
ReportFormat = Annotated[Format, typer.Option("--format", help="Of what --dry-run says.")]


def parse_clients(text: str) -> tuple[int, ...]:
    """Parse "0,2,5-7" into (0, 2, 5, 6, 7)."""
    clients: set[int] = set()
    for part in filter(None, text.replace(" ", "").split(",")):
        found = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise typer.BadParameter(f"--clients {text}: want numbers as in 3 or 0-3 or 0,2,5-7")
        clients.update(range(first, last + 1))
    return tuple(sorted(clients))


def parse_limits(memory: str, nbytes: str, seconds: float) -> Limits | None:
    """What a round may take here, or None where nothing is said."""
    from protocol.parts import Limits

    if not 0 <= seconds <= 1e9:
        raise typer.BadParameter(f"--max-seconds {seconds}: want 0 to 10^9")
    said = Limits(
        memory=parse_size("--max-memory", memory) if memory else None,
        bytes=parse_size("--max-bytes", nbytes) if nbytes else None,
        seconds=seconds or None,
    )
    return None if said == Limits() else said


def parse_ranks(
    number: int, patience_seconds: float, evaluates: bool, fsdp: bool = False
) -> Ranks | None:
    """The group of processes that a node is: ours to start, or torchrun's; None for one alone."""
    from node import ranks
    from node.engine import Ranks

    if not 1 <= patience_seconds <= 1e6:
        raise typer.BadParameter(f"--rank-patience {patience_seconds}: want 1 to 10^6")
    launched = ranks.launched()
    if launched is None and number == 1:
        if fsdp:
            raise typer.BadParameter("--fsdp: it takes ranks to deal a model: --ranks, or torchrun")
        return None
    if launched is not None and number > 1:
        raise typer.BadParameter("--ranks: torchrun has started the ranks already")
    if evaluates:
        raise typer.BadParameter("--evaluate: an evaluator is one process, without ranks")
    rank, size = launched or (0, number)
    return Ranks(size, patience_seconds, rank, is_launched=launched is not None, fsdp=fsdp)


def parse_size(option: str, text: str) -> int:
    """Parse "200kB" into 200000; kB, MB and GB are powers of 1000."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([kKMG]?)B?", text.strip())
    size = round(float(found[1]) * 1000 ** " KMG".index(found[2].upper() or " ")) if found else 0
    if not 0 < size <= 1 << 40:
        raise typer.BadParameter(f"{option} {text}: want a size as in 1500 or 200kB or 1.5GB")
    return size


def checked_name(name: str) -> str:
    """The name itself, if the coordinator will take it."""
    from protocol.keys import NAME

    if not re.fullmatch(NAME, name):
        raise typer.BadParameter(f"--name {name!r}: want up to 63 letters, digits, '.', '_', '-'")
    return name
