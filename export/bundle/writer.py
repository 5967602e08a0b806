"""Writing a bundle: complete or absent.

Everything goes into `<out>.partial`, which is renamed at the end. A failure removes it; an interrupt leaves
it for `--resume`, with a key that says which export it belongs to. An old bundle is moved aside only when the
new one is complete, and moved back if the last step fails.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from export.bundle.manifest import MANIFEST, check_manifest, dump
from export.spec import ExportError, UsageError

KEY = ".resume.json"
"""Marks a folder of ours that is unfinished, and says which export it belongs to."""
MARK = ".replaced"
"""Marks an old bundle that a new one is about to replace."""


def _sibling(output: Path, suffix: str) -> Path:
    return output.with_name(output.name + suffix)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, or that `--overwrite` must not replace because it is no bundle.

    Raises:
        UsageError: naming the folder and the remedy.
    """
    _recover(output)
    for suffix, mark, what in (
        (".partial", KEY, "unfinished export"),
        (".replaced", MARK, "replaced bundle"),
        (".rejected", MANIFEST, "rejected bundle"),
    ):
        folder = _sibling(output, suffix)
        if (folder.exists() or folder.is_symlink()) and not (folder / mark).is_file():
            raise UsageError(f"{folder} is in the way and no {what} of ours; move it, or choose another -o")
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise UsageError(f"{output} exists; choose another -o, or replace it with --overwrite")
    is_bundle = output.is_dir() and not output.is_symlink() and (output / MANIFEST).is_file()
    if not is_bundle and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"{output} exists and is no bundle; --overwrite only replaces bundles: choose another -o")


def _recover(output: Path) -> None:
    """Finish what a crash in the middle of `_replace` left: put the old bundle back, or remove it."""
    old = _sibling(output, ".replaced")
    if not (old / MARK).is_file() or old.is_symlink():
        return
    if output.exists():
        shutil.rmtree(old)
    else:
        (old / MARK).unlink()
        old.rename(output)


class BundleWriter:
    """A bundle under construction in `path`; use as a context manager.

    Args:
        output: the final folder.
        key: what decides the bundle's content; `resume` continues only an export of the same key.
        overwrite: replace an existing bundle, once the new one is complete.
        resume: continue an interrupted export if there is one, else start.

    Raises:
        UsageError: the output exists, or `<out>.partial` belongs to another export.
    """

    def __init__(self, output: Path, key: dict[str, Any], *, overwrite: bool, resume: bool) -> None:
        self.output = output
        self.path = _sibling(output, ".partial")
        self.rejected = _sibling(output, ".rejected")
        self.resumed = False
        self._roles: dict[str, str] = {}
        self._key = json.dumps(key, sort_keys=True, default=str)
        check_output(output, overwrite=overwrite)
        if resume and self.path.exists():
            difference = _difference(self.path / KEY, self._key)
            if difference is not None:
                raise UsageError(
                    f"{self.path} belongs to another export ({difference}); "
                    "repeat the same options, or leave out --resume to start anew"
                )
            self.resumed = True

    def __enter__(self) -> Self:
        try:
            self._begin()
        except BaseException as error:  # Python calls __exit__ only after __enter__ succeeded
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _begin(self) -> None:
        if self.resumed:
            return
        if self.path.exists():
            shutil.rmtree(self.path)  # ours: check_output has seen its key
        self.path.mkdir(parents=True)
        (self.path / KEY).write_text(self._key, encoding="utf-8")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, KeyboardInterrupt):
            self.discard()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExportError(
                f"no space left on the disk of {self.output.absolute().parent}; free some and repeat, or choose "
                "another -o (nothing was kept)"
            ) from error

    def add(self, path: str, role: str) -> Path:
        """Announce a file with its role; returns where to write it. Folders above it are made."""
        self._roles[path] = role
        file = self.path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def add_json(self, path: str, role: str, value: Any) -> None:
        """Write a JSON file in the form of `dump`."""
        self.add(path, role).write_text(dump(value), encoding="utf-8")

    def files(self) -> list[dict[str, Any]]:
        """Path, role and size of what was announced and written so far."""
        found = [(path, role, self.path / path) for path, role in sorted(self._roles.items())]
        return [{"path": p, "role": r, "bytes": file.stat().st_size} for p, r, file in found if file.is_file()]

    def discard(self) -> None:
        """Remove what was written so far."""
        shutil.rmtree(self.path, ignore_errors=True)

    def commit(self, manifest: dict[str, Any], *, accepted: bool) -> Path:
        """Write the manifest and move the folder to its final name, or to `<out>.rejected`.

        `files` of the manifest is filled in; files that nobody announced are removed.

        Raises:
            BundleError: the manifest breaks the contract.
        """
        manifest["files"] = [self._entry(path, role) for path, role in sorted(self._roles.items())]
        check_manifest(manifest)
        (self.path / MANIFEST).write_text(dump(manifest), encoding="utf-8")
        keep = {*self._roles, MANIFEST}
        for file in [p for p in self.path.rglob("*") if p.is_file() or p.is_symlink()]:
            name = file.relative_to(self.path).as_posix()
            if name in keep:
                _sync(file)
            elif name != KEY:
                file.unlink()  # a journal, or a leftover of the interrupted run
        for folder in sorted((p for p in self.path.rglob("*") if p.is_dir()), reverse=True):
            if not any(folder.iterdir()):
                folder.rmdir()  # of something that was interrupted
        target = self.output if accepted else self.rejected
        # The key goes last: an interrupt up to here can still be continued.
        (self.path / KEY).unlink()
        _sync(self.path)
        self._replace(target)
        with contextlib.suppress(OSError):  # not every file system can sync a folder
            _sync(target.absolute().parent)
        return target

    def _entry(self, path: str, role: str) -> dict[str, Any]:
        file = self.path / path
        return {"path": path, "bytes": file.stat().st_size, "sha256": sha256(file), "role": role}

    def _replace(self, target: Path) -> None:
        """Rename the finished folder to `target`, keeping what stood there until that succeeded."""
        if target == self.rejected and target.exists():
            shutil.rmtree(target)  # evidence of an earlier try: nobody misses it
        if not target.exists():
            self.path.rename(target)
            return
        old = _sibling(self.output, ".replaced")
        (target / MARK).touch()
        target.rename(old)
        try:
            self.path.rename(target)
        except BaseException:
            if not target.exists():
                (old / MARK).unlink()
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _difference(file: Path, text: str) -> str | None:
    """How an unfinished export differs from the wanted one; None if it does not."""
    try:
        old = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "its key is missing or unreadable"
    new = json.loads(text)
    if not isinstance(old, dict):
        return "its key is unreadable"
    for name in sorted({*new, *old}):
        if old.get(name) != new.get(name):
            return f"{name}: {old.get(name)!r} then, {new.get(name)!r} now"
    return None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
