"""Errors of deployment that a person can mend: one line each, and an exit code.

As ``protocol.errors``, which ``deploy`` does not import; the codes are in ``docs/errors.md``.
"""

from __future__ import annotations


class DeployError(Exception):
    """Something the user can mend.  The message is one line that says how."""

    exit_code = 1


class InventoryError(DeployError):
    """The inventory cannot be read, has a typo, or contradicts itself."""

    exit_code = 12


class HostError(DeployError):
    """A host cannot be reached, or a command there has failed."""

    exit_code = 13


class LabError(DeployError):
    """An emulated cluster cannot be made or changed as asked."""

    exit_code = 14
