"""One packed copy of each weight for all methods of a process: the runtime's weights cache, as phones have it.

The published Android and Apple packages are built with the cache on, the Python package with it off. There it
is an option of the XNNPACK backend that no Python function sets, but the shared library exports the C++ one.
"""

from __future__ import annotations

import ctypes
import sys
from importlib import metadata
from typing import Any

VERSIONS = ("1.5.",)
"""Releases whose `BackendOption` was compared with the one below."""
_BACKEND, _KEY = b"XnnpackBackend", b"weight_cache_enabled"
_SET, _GET = (
    f"_ZN10executorch7runtime10{word}_optionEPKcNS0_4SpanINS0_13BackendOptionEEE" for word in ("set", "get")
)


class _Option(ctypes.Structure):
    """`executorch::runtime::BackendOption`: a key and a `std::variant<bool, int, std::array<char, 256>>`.

    libstdc++ numbers the variant's type in one byte, libc++ in four; both at the same place and little-endian.
    """

    _fields_ = (
        ("key", ctypes.c_char * 64),
        ("value", ctypes.c_uint32),
        ("rest", ctypes.c_char * 252),
        ("kind", ctypes.c_uint32),
    )


class _Span(ctypes.Structure):
    """`executorch::runtime::Span<BackendOption>`."""

    _fields_ = (("data", ctypes.POINTER(_Option)), ("size", ctypes.c_size_t))


def share_packed_weights() -> bool:
    """Turn the cache on for all methods this process loads from now on; returns whether it is on.

    It is a property of the process, like the runtime's threads. Where this release or platform offers no way to
    turn it on, nothing changes: each method then packs its own copy, and results are the same.
    """
    if sys.platform not in ("linux", "darwin") or not _version().startswith(VERSIONS):
        return False
    import torch  # noqa: F401  its libraries must be in memory before the runtime's
    from executorch.extension.pybindings import _C

    try:
        # Looked up through the extension, so that it is the copy of the library that the extension uses.
        library = ctypes.CDLL(_C.__file__)
        write, read = (_function(library, name) for name in (_SET, _GET))
    except (OSError, AttributeError):
        return False
    wanted, found = _Option(_KEY, 1), _Option(_KEY, 0)
    done = write(_BACKEND, _Span(ctypes.pointer(wanted), 1)) == 0
    return done and read(_BACKEND, _Span(ctypes.pointer(found), 1)) == 0 and bool(found.value)


def _version() -> str:
    try:
        return metadata.version("executorch")
    except metadata.PackageNotFoundError:
        return ""


def _function(library: ctypes.CDLL, name: str) -> Any:
    function = getattr(library, name)
    function.argtypes, function.restype = (ctypes.c_char_p, _Span), ctypes.c_uint32
    return function
