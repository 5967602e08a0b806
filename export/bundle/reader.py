"""Reading a bundle: nothing is trusted before manifest, paths, sizes and hashes were checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.bundle.manifest import MANIFEST, BundleError, check_manifest
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
            BundleError: not a bundle, contract broken, or a file missing, changed or not listed.
        """
        folder = Path(path)
        file = folder / MANIFEST
        if not file.is_file():
            raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}; give the folder an export wrote")
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BundleError(f"{file} is not valid JSON ({error}); export the bundle again") from error
        if not isinstance(manifest, dict):
            raise BundleError(f"{file} is no JSON object; export the bundle again")
        check_manifest(manifest)
        _check_files(folder, manifest, verify)
        return cls(folder, manifest)

    def file(self, path: str) -> Path:
        return self.path / path


def _check_files(folder: Path, manifest: dict[str, Any], verify: bool) -> None:
    root = folder.resolve()
    listed = set()
    for entry in manifest["files"]:
        path = folder / entry["path"]
        if not path.is_file():
            raise BundleError(f"{entry['path']} is listed in {MANIFEST} but absent; copy the bundle again")
        if root not in path.resolve().parents:
            raise BundleError(f"{entry['path']} leads outside the bundle (a link); bundles hold plain files")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise BundleError(
                f"{entry['path']} has {size} bytes, {MANIFEST} says {entry['bytes']}; copy the bundle again"
            )
        if verify and sha256(path) != entry["sha256"]:
            raise BundleError(f"{entry['path']} was changed: its sha256 is not the one in {MANIFEST}")
        listed.add(path.resolve())
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.resolve() not in listed and path.name != MANIFEST:
            raise BundleError(f"{path.relative_to(folder)} is not listed in {MANIFEST}; remove it")
