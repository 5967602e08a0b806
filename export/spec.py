"""What to export, and the errors that stop an export with a message for the user."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class ExportError(Exception):
    """Anything that stops an export; the message says what, the value, the rule and the remedy."""

    exit_code = 1


class UsageError(ExportError):
    """An option has a value that cannot be honoured."""

    exit_code = 2


class GateError(ExportError):
    """The bundle was written but a check of the ladder failed."""

    exit_code = 3
