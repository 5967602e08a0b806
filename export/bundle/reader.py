"""Reading a bundle: nothing is trusted before manifest, paths, sizes and hashes were checked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.bundle.manifest import MANIFEST, BundleError, load
from export.bundle.writer import sha256


@dataclass(frozen=True)
class Bundle:
    """A checked bundle: its folder and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> Bundle:
        """Read and check a bundle; `verify` False skips the hashes (sizes are always compared).

        Raises:
            BundleError: not a bundle, contract broken, or a file missing, changed, linked or not listed.
        """
        folder = Path(path)
        file = folder / MANIFEST
        if not file.is_file():
            hint = "it is unfinished: continue its export with --resume" if folder.name.endswith(".partial") else (
                "give the folder an export wrote"
            )
            raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}; {hint}")
        manifest = load(file)
        _check_files(folder, manifest, verify)
        return cls(folder, manifest)

    def file(self, path: str) -> Path:
        """Where a listed file lies.

        Raises:
            BundleError: the manifest does not list it.
        """
        if all(entry["path"] != path for entry in self.manifest["files"]):
            raise BundleError(f"{path} is not a file of {self.path}; see `files` of its {MANIFEST}")
        return self.path / path


def _check_files(folder: Path, manifest: dict[str, Any], verify: bool) -> None:
    present = set()
    for path in walk(folder):
        if (folder / path).is_symlink():
            raise BundleError(f"{path} is a link, which may lead outside the bundle; bundles hold plain files")
        present.add(path)
    for entry in manifest["files"]:
        path = entry["path"]
        if path not in present:
            raise BundleError(f"{path} is listed in {MANIFEST} but absent; copy the bundle again")
        size = (folder / path).stat().st_size
        if size != entry["bytes"]:
            raise BundleError(f"{path} has {size} bytes, {MANIFEST} says {entry['bytes']}; copy the bundle again")
        if verify and sha256(folder / path) != entry["sha256"]:
            raise BundleError(f"{path} was changed: its sha256 is not the one in {MANIFEST}; copy the bundle again")
    extra = present - {entry["path"] for entry in manifest["files"]} - {MANIFEST}
    if extra:
        raise BundleError(f"{min(extra)} is not listed in {MANIFEST}; remove it from the bundle")


def walk(folder: Path) -> Iterator[str]:
    """Relative paths, with forward slashes, of all files and links below a folder; links are not followed."""
    for root, folders, files in os.walk(folder, followlinks=False):
        here = Path(root)
        for name in files + [name for name in folders if (here / name).is_symlink()]:
            yield (here / name).relative_to(folder).as_posix()
