"""What processes are forked from: it has imported all that they would."""

from __future__ import annotations

import contextlib
import importlib

import pytest  # noqa: F401 - the test's own main module, which a child looks at

from tests.faults import coordinator, node  # noqa: F401 - what they will be

for name in (
    *("coordinator.run", "rich._emoji_codes", "tomllib", "zoneinfo", "pydantic"),
    "torch.distributed",  # for nodes that average among themselves
):
    with contextlib.suppress(ImportError):  # typer brings the last one, or not
        importlib.import_module(name)
