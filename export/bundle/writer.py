"""Writing a bundle: complete or absent.

Everything goes into `<out>.partial`, which is renamed at the end. A failure removes it; an interrupt leaves
it for `--resume`, with a key that says which export it belongs to.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from export.bundle.manifest import MANIFEST, BundleError, check_manifest, dump
from export.spec import ExportError

KEY = ".resume.json"


class BundleWriter:
    """A bundle under construction in `path`; use as a context manager.

    Args:
        output: the final folder. overwrite: an existing bundle there is replaced, but only once the new one
        is complete. resume: continue an interrupted export with the same key.

    Raises:
        BundleError: the output exists, or `--resume` finds nothing it can continue.
    """

    def __init__(self, output: Path, key: dict[str, Any], *, overwrite: bool, resume: bool) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".partial")
        self.rejected = output.with_name(output.name + ".rejected")
        self.resumed = False
        self._roles: dict[str, str] = {}
        self._overwrite = overwrite
        text = json.dumps(key, sort_keys=True, default=str)
        if output.exists() and not overwrite:
            raise BundleError(f"{output} exists; choose another -o, or replace it with --overwrite")
        if resume and self.path.exists():
            found = self.path / KEY
            if not found.exists() or found.read_text() != text:
                raise BundleError(
                    f"{self.path} belongs to another export ({_difference(found, key)}); "
                    "repeat the same options, or leave out --resume to start anew"
                )
            self.resumed = True
        else:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            (self.path / KEY).write_text(text)

    def add(self, path: str, role: str) -> Path:
        """Announce a file with its role; returns where to write it."""
        self._roles[path] = role
        return self.path / path

    def add_json(self, path: str, role: str, value: Any) -> None:
        self.add(path, role).write_text(dump(value), encoding="utf-8")

    def commit(self, manifest: dict[str, Any], *, accepted: bool) -> Path:
        """Write the manifest and move the folder to its final name, or to `.rejected`.

        Raises:
            BundleError: the manifest breaks the contract.
        """
        (self.path / KEY).unlink(missing_ok=True)
        manifest["files"] = [
            {"path": path, "bytes": (self.path / path).stat().st_size, "sha256": sha256(self.path / path), "role": role}
            for path, role in sorted(self._roles.items())
        ]
        check_manifest(manifest)
        (self.path / MANIFEST).write_text(dump(manifest), encoding="utf-8")
        for file in sorted(p for p in self.path.rglob("*") if p.is_file()):
            _sync(file)
        target = self.output if accepted else self.rejected
        old = target.with_name(target.name + ".old")
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        self.path.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        return target

    def __enter__(self) -> BundleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, KeyboardInterrupt):
            shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise ExportError(
                f"no space left on the disk of {self.output.parent}; free some and repeat (nothing was kept)"
            ) from error


def _difference(found: Path, key: dict[str, Any]) -> str:
    try:
        old = json.loads(found.read_text())
    except (OSError, ValueError):
        return "its key is missing or unreadable"
    new = json.loads(json.dumps(key, default=str))
    changed = [f"{k}: {old.get(k)!r} then, {v!r} now" for k, v in new.items() if old.get(k) != v]
    return changed[0] if changed else "its key differs"


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
