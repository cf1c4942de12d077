"""With what software a run is made: its result depends on it."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = (
    *("seedwire", "torch", "transformers", "tokenizers", "peft", "safetensors", "datasets"),
    *("flwr-datasets", "pyarrow", "pyzmq", "msgpack", "msgspec", "numpy"),
)


def versions() -> dict[str, str]:
    """Of Python, the machine and the packages that a result depends on."""
    found = {name: _version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "machine": platform.platform()} | found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
