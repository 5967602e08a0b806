"""The ExecuTorch runtime of the Python package, and what it says when it refuses something."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from export.spec import ExportError


def library() -> Any:
    """The runtime's Python module, with the kernels our programs call registered."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  registers llama::custom_sdpa, …
        from executorch.extension.pybindings import portable_lib

    return portable_lib


def use_threads(count: int) -> None:
    """Give the runtime's pool so many threads; the pool is one for the whole process."""
    runtime = library()
    if runtime._threadpool_get_thread_count() != count:
        runtime._unsafe_reset_threadpool(count)


def load_program(path: Path, manifest: Mapping[str, Any], trace: bool = False) -> Any:
    """Open a .pte; its methods are loaded one by one."""
    return library()._load_program(str(path), enable_etdump=trace)


def load_method(program: Any, file: str, entry: str) -> Any:
    return program.load_method(entry)


def call(method: Any, inputs: Sequence[Any], entry: str) -> list[Any]:
    """Run a method; results lie in the runtime's memory until its next call."""
    return list(method.call(inputs, clone_outputs=False))
