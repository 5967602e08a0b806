"""Runtimes a bundle can be built for. A target is one folder and one line here."""

from __future__ import annotations

from importlib import import_module

from export.spec import UsageError
from targets.base import Target

TARGETS = {"onnx": "targets.to_onnx", "executorch": "targets.to_executorch"}


def load_target(name: str) -> Target:
    """Import one target; its SDK is imported only when it lowers or opens a bundle.

    Raises:
        UsageError: no such target.
    """
    if name not in TARGETS:
        raise UsageError(f"unknown target {name!r}; choose one of: {', '.join(TARGETS)}")
    target: Target = import_module(TARGETS[name]).TARGET
    return target
