"""Runtimes a bundle can be built for. A target is one folder and one line here. Torch-free."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from export.spec import ExportError, UsageError
from targets.base import Target

TARGETS = {"onnx": "targets.to_onnx", "executorch": "targets.to_executorch", "coreml": "targets.to_coreml"}


def describe_target(name: str) -> Target:
    """One target, to ask what it can do; its packages need not be there.

    Raises:
        UsageError: no such target.
    """
    if name not in TARGETS:
        raise UsageError(f"unknown target {name!r}; choose one of: {', '.join(TARGETS)}")
    target: Target = import_module(TARGETS[name]).TARGET
    return target


def load_target(name: str) -> Target:
    """One target, to lower for it or open its bundles; its SDK is imported only when it does.

    Raises:
        UsageError: no such target. ExportError: a package it needs is not installed.
    """
    target = describe_target(name)
    missing = [package for package in target.packages if find_spec(package) is None]
    if missing:
        raise ExportError(
            f"target {name} needs the Python package {missing[0]}, which is not installed; "
            f"install it with pip install 'qwen35-mobile[{name}]'"
        )
    return target
