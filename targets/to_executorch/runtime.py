"""The ExecuTorch runtime of the Python package, and clear words for what it refuses with a bare number."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from weakref import WeakSet

from export.spec import ExportError
from targets.quiet import quiet_imports

ERRORS = {
    0x10: "it does not support something in the program",
    0x12: "an argument has the wrong shape or type",
    0x14: "a kernel is missing",
    0x20: "something the program names is missing, such as a backend",
    0x21: "there is not enough memory",
    0x22: "the file cannot be read",
    0x23: "the program is damaged, or of another version",
    0x24: "the weights are damaged or missing",
    0x30: "a delegate is of another version",
    0x31: "there is not enough memory for a delegate",
}
"""Codes of runtime/core/error.h that loading a program can end with."""
MEMORY = {0x21, 0x31}


@cache
def library() -> Any:
    """The runtime's Python module, with the kernels our programs call registered.

    Raises:
        ExportError: the package is not installed, or not usable here.
    """
    with quiet_imports():
        try:
            import executorch.kernels.quantized  # noqa: F401  the gathers of `text_runner`
            from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  llama::custom_sdpa and others
            from executorch.extension.pybindings import portable_lib
        except (ImportError, OSError) as error:
            raise ExportError(
                f"the ExecuTorch runtime cannot be used: {error}; "
                "install it with pip install 'qwen35-mobile[executorch]'"
            ) from error
    with _quiet_processors():
        portable_lib._threadpool_get_thread_count()  # makes the pool
    return portable_lib


@contextmanager
def _quiet_processors() -> Iterator[None]:
    """The pool, when it is made, writes to stderr which files about processors it did not find."""
    try:
        kept = os.dup(2)
    except OSError:  # closed: nothing is heard anyway
        yield
        return
    sys.stderr.flush()
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


_open_sessions: WeakSet[Any] = WeakSet()
"""Whose methods point into the runtime's pool of threads, which is one for the process."""


def use_threads(count: int, session: Any) -> None:
    """Give the runtime's pool so many threads, for as long as the session is open.

    Raises:
        ExportError: another open session was given another number.
    """
    runtime = library()
    present = runtime._threadpool_get_thread_count()
    if present != count:
        if _open_sessions:
            raise ExportError(
                f"ExecuTorch has one pool of threads for the process, and an open session uses {present}; "
                f"close it before opening one with {count}"
            )
        runtime._unsafe_reset_threadpool(count)
    _open_sessions.add(session)


def release_threads(session: Any) -> None:
    """The session is closed: its methods are gone."""
    _open_sessions.discard(session)


def check_version(manifest: Mapping[str, Any]) -> None:
    """Refuse a runtime older than the bundle needs: it would fail with a number, or not at all.

    Raises:
        ExportError: naming both versions.
    """
    try:
        installed = version("executorch")
    except PackageNotFoundError:
        return  # `library` says so
    needed = manifest["target"]["min_version"]
    if _numbers(installed) < _numbers(needed):
        raise ExportError(
            f"the bundle needs executorch >= {needed}, and {installed} is installed; upgrade the runtime"
        )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def check_program(path: Path) -> None:
    """Refuse a .pte of whose methods this runtime lacks a kernel or a backend, before anything is loaded.

    Raises:
        ExportError: no program, or naming what is missing.
    """
    from targets.to_executorch.stored import Pte

    runtime = library()
    plans = Pte(path).program.execution_plan
    kernels = {f"{o.name}.{o.overload}".rstrip(".") for plan in plans for o in plan.operators}
    missing = sorted(kernels - set(runtime._get_operator_names()))
    if missing:
        raise ExportError(
            f"{path.name} calls {missing[0]}, which this runtime does not have; link the library of kernels that does "
            "(kernels_llm for llama::…, kernels_optimized or portable for aten::…)"
        )
    for backend in sorted({delegate.id for plan in plans for delegate in plan.delegates}):
        if not runtime._is_available(backend):
            raise ExportError(f"{path.name} needs {backend}, which this runtime was built without; link it")


def load_program(path: Path, trace: bool = False) -> Any:
    """Open a .pte; its methods are loaded one by one.

    Raises:
        ExportError: the runtime refuses it.
    """
    try:
        return library()._load_program(str(path), enable_etdump=trace)
    except RuntimeError as error:
        raise _told(f"cannot load {path.name}", error) from error


def load_method(program: Any, file: str, entry: str) -> Any:
    """Make a method ready to run.

    Raises:
        ExportError: the runtime refuses it.
    """
    try:
        return program.load_method(entry)
    except RuntimeError as error:
        raise _told(f"cannot load method {entry} of {file}", error) from error


def call(method: Any, inputs: Sequence[Any], entry: str) -> list[Any]:
    """Run a method; results lie in the runtime's memory until its next call.

    Raises:
        ExportError: the runtime stopped in it; what it wrote is not to be used.
    """
    try:
        return list(method.call(inputs, clone_outputs=False))
    except RuntimeError as error:
        raise _told(f"failed in method {entry}", error) from error


def _told(what: str, error: RuntimeError) -> ExportError:
    code = re.search(r"0x:?([0-9a-fA-F]+)", str(error))
    number = int(code[1], 16) if code else 0
    why = f"{ERRORS[number]} (error {number:#x})" if number in ERRORS else str(error)
    remedy = "copy the bundle again, or export it with the version of executorch that runs it"
    if number in MEMORY:
        remedy = "close other programs, or take a smaller context, model or prefill length"
    return ExportError(f"executorch {version('executorch')} {what}: {why}; {remedy}")
