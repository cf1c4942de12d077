"""Hypothesis profiles: ``dev`` here, ``ci`` (the same examples every time) where CI is set."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("dev", max_examples=50, deadline=None)  # machines are busy
settings.register_profile("ci", max_examples=50, derandomize=True, deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")
