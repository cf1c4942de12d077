"""The table of ``seedwire memory``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from node.memory import Needs, Order, measure, settings
from protocol.errors import ExperimentError
from protocol.experiment import Data, Model, Peft

_COLUMNS = ("weights", "inference peak", "step peak", "step / inference", "over inference")


def compare(
    methods: Sequence[str],
    model: dict[str, Any],
    peft: dict[str, Any],
    how: dict[str, Any],
    *,
    is_json: bool,
) -> None:
    """Measure one method after the other, and print a line or a row for each.

    Raises:
        ExperimentError: no such method, model or task; a method that fails has its reason
            in the table instead.
    """
    try:
        msgspec.convert(model, Model)
        msgspec.convert(peft, Peft)
        msgspec.convert({"id": "none", "task": how["task"]}, Data)
    except msgspec.ValidationError as error:
        raise ExperimentError(str(error)) from error
    if peft["kind"] == "full" and model["dtype"] != "fp32":
        raise ExperimentError(f"all parameters cannot be trained in {model['dtype']}: take fp32")
    for method in methods:
        settings(method, how["batch"])
    table = Table(title=f"{model['id']}, {model['dtype']}, {how['batch']} x {how['length']} tokens")
    table.add_column("method")
    for column in (*_COLUMNS, "seconds"):
        table.add_column(column, justify="right")
    console = Console()
    for method in methods:
        order = Order(method, model, peft, **how)
        try:
            needs = measure(order)
        except ExperimentError as error:
            table.add_row(method, str(error))
            if is_json:
                typer.echo(json.dumps({"method": method, "error": str(error)}))
            continue
        if is_json:
            typer.echo(json.dumps(asdict(needs)))
        table.add_row(method, *cells(needs))
    if not is_json:
        console.print(table)


def cells(needs: Needs) -> list[str]:
    """A row of the table; a peak that nothing measures is absent."""
    seconds = f"{needs.step_seconds:.2f}"
    if needs.inference is None or needs.step is None:
        return [_size(needs.weights), "absent", "absent", "absent", "absent", seconds]
    return [
        _size(needs.weights),
        _size(needs.inference),
        _size(needs.step),
        f"{needs.step / needs.inference:.2f}",
        _size(needs.step - needs.inference),
        seconds,
    ]


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
