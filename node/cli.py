"""``seedwire node``: host clients for a coordinator; ``seedwire fetch``: get a model or data."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node import options
from node.options import Format
from protocol.errors import KeyStoreError
from protocol.process import command_line

if TYPE_CHECKING:
    from node.engine import Ranks
    from node.start import Start
    from protocol.keys import Token

HANDED_OVER = Path("-")  # as --keys: on standard input, by whoever starts us


def node(
    coordinator: options.Coordinator,
    clients: options.Clients = "",
    name: options.Name = "",
    keys: options.Keys = None,
    token: options.TokenText = "",
    token_file: options.TokenFile = None,
    insecure: options.Insecure = False,
    device: options.Device = "cpu",
    threads: options.Threads = 0,
    ranks: options.NumRanks = 1,
    fsdp: options.Fsdp = False,
    rank_patience: options.RankPatience = 120.0,
    give_up: options.GiveUp = 0.0,
    evaluate: options.Evaluate = False,
    export: options.Export = None,
    state: options.State = None,
    energy: options.Energy = "",
    max_memory: options.MaxMemory = "",
    max_bytes: options.MaxBytes = "",
    max_seconds: options.MaxSeconds = 0.0,
    lifeline: options.Lifeline = False,
    dry_run: options.DryRun = False,
    form: options.ReportFormat = Format.TEXT,
) -> None:
    """Host clients: log in, load model and data once, train when asked, leave on SIGTERM."""
    from node.admission import Admission, handed_over
    from node.engine import Setup
    from node.start import Start
    from protocol import keys as stores

    _prepare_process()
    group = options.parse_ranks(ranks, rank_patience, evaluate, fsdp)
    if group is not None and group.rank:  # torchrun starts them all by one command line
        _follow(group)
        return
    with command_line():
        given = handed_over() if keys == HANDED_OVER else None  # before it is the lifeline
    limits = options.parse_limits(max_memory, max_bytes, max_seconds)
    hosted = options.parse_clients(clients)
    if not hosted and not evaluate:
        raise typer.BadParameter("--clients says which clients this node hosts")
    setup = Setup(hosted, evaluate, export, device, threads, state)
    setup = replace(setup, energy=energy, limits=limits, ranks=group)
    who = options.checked_name(name or stores.host_name() + ("-evaluator" if evaluate else ""))
    with command_line():
        paper = _token(token, token_file)
    admission = Admission(coordinator, who, keys or stores.default_directory(), paper, give_up)
    start = Start(setup, admission, insecure, given)
    if dry_run:
        _report(start, form)
    else:
        _live(start, lifeline)


def _prepare_process() -> None:
    # torch's idle OpenMP threads spin for milliseconds, on cores that the noise kernels and
    # other nodes of this machine could use; read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.pop("SEEDWIRE_TOKEN", None)  # none of a child's business
    form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, stream=sys.stderr)


def _live(start: Start, lifeline: bool) -> None:
    from node.start import Life

    life = Life(start)
    with life.ending(), command_line(lifeline):
        life.live()


def _follow(group: Ranks) -> None:
    from node.follower import launched

    with command_line():
        launched(group)


def _report(start: Start, form: Format) -> None:
    import msgspec

    from node.dry_run import describe, look

    with command_line():
        report = look(start)
    is_json = form is Format.JSON
    typer.echo(msgspec.json.encode(report).decode() if is_json else describe(report))
    raise typer.Exit(report.exit_code)


def _token(text: str, file: Path | None) -> Token | None:
    from protocol import keys

    if text and file is not None:
        raise KeyStoreError("a token and --token-file: one of them will do")
    text = text or (keys.read_secret_text(file) if file is not None else "")
    return keys.Token.parse(text) if text else None


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
